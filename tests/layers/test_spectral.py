"""Weights with a learned spectral norm."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.layers.spectral import baked, fold, reparametrise, spectral_weight


@pytest.fixture(scope="module")
def published(golden):
    with np.load(f"{golden.ROOT}/radio_algorithms.npz") as file:
        return dict(file)


def _unit(golden, name, size):
    return F.normalize(torch.from_numpy(golden.rng_of(name).standard_normal(size)), dim=0).float()


def _net():
    return nn.ModuleDict(dict(qkv=nn.Linear(8, 24), w12=nn.Linear(8, 12), out=nn.Linear(6, 4)))


@pytest.mark.parametrize("version", [1, 2])
def test_the_effective_weight_equals_the_published_one(golden, published, version):
    weight = torch.from_numpy(golden.fill_value("spectral.weight", (48, 32)))
    u, v = _unit(golden, "spectral.u", 48), _unit(golden, "spectral.v", 32)
    ours = spectral_weight(weight, u, v, torch.full((1, 1), 0.3), version)
    # uᵀWv is a small difference of large terms: its float32 rounding is what is left
    np.testing.assert_allclose(ours.numpy(), published[f"spectral_v{version}"], rtol=1e-5)


@pytest.mark.parametrize("leaves", [("u", "v", "raw"), ("_u", "_v", "scale")])
def test_a_stacked_weight_is_baked_in_parts_as_published(golden, published, leaves):
    state = {
        "qkv.parametrizations.weight.original": torch.from_numpy(
            golden.fill_value("spectral.qkv", (96, 32))
        ),
        "qkv.bias": torch.ones(96),
    }
    for i in range(3):
        values = (
            _unit(golden, f"spectral.u{i}", 32),
            _unit(golden, f"spectral.v{i}", 32),
            torch.full((1, 1), 0.1 * (i + 1)),
        )
        root = f"qkv.parametrizations.weight.0.parts.{i}."
        state |= {root + leaf: value for leaf, value in zip(leaves, values, strict=True)}
        state[root + "_sn_version"] = torch.tensor(2)
    plain = baked(state)
    assert sorted(plain) == ["qkv.bias", "qkv.weight"]
    np.testing.assert_allclose(plain["qkv.weight"].numpy(), published["spectral_qkv"], rtol=1e-5)


def test_a_file_without_a_version_is_baked_as_version_1():
    weight, u, v = torch.randn(4, 3), torch.randn(4), torch.randn(3)
    root = "fc.parametrizations.weight."
    state = {
        root + "original": weight,
        root + "0._u": u,
        root + "0._v": v,
        root + "0.scale": torch.tensor([[0.5]]),
    }
    expected = weight * 0.5 / (u @ weight @ v + 1e-6)
    torch.testing.assert_close(baked(state)["fc.weight"], expected)


def test_a_state_dict_without_parametrisations_is_left_alone():
    state = _net().state_dict()
    assert baked(state) == dict(state)


@pytest.mark.parametrize("version", [1, 2])
def test_reparametrising_changes_no_weight_at_first(version):
    net = _net().eval()
    before = {name: part.weight.detach().clone() for name, part in net.items()}
    reparametrise(net, version=version, glu=["w12"])
    for name, part in net.items():
        torch.testing.assert_close(part.weight, before[name])


def test_every_part_gets_the_norm_that_its_scale_says():
    net = reparametrise(_net(), glu=["w12"]).train()
    for _ in range(100):
        net["qkv"].weight, net["w12"].weight  # each access takes a step
    net.eval()
    scales = net["qkv"].parametrizations.weight[0]
    with torch.no_grad():
        for i, scale in enumerate(scales.parts):
            scale.raw.fill_(0.2 * i)
    for i, chunk in enumerate(net["qkv"].weight.chunk(3)):
        wanted = F.softplus(torch.tensor(0.2 * i)) + 0.05
        torch.testing.assert_close(torch.linalg.matrix_norm(chunk, 2), wanted, rtol=1e-4, atol=0)
    assert len(net["w12"].parametrizations.weight[0].parts) == 2


def test_values_keep_their_weight_when_only_q_and_k_are_scaled():
    net = reparametrise(_net(), scale_values=False).eval()
    with torch.no_grad():
        for scale in net["qkv"].parametrizations.weight[0].parts:
            scale.raw.add_(1)
    original = net["qkv"].parametrizations.weight.original
    same = (net["qkv"].weight == original).view(3, -1).all(dim=1)
    assert same.tolist() == [False, False, True]


def test_only_training_takes_power_steps():
    net = reparametrise(nn.ModuleDict(dict(fc=nn.Linear(5, 5)))).eval()
    scale = net["fc"].parametrizations.weight[0]
    with torch.no_grad():
        net["fc"].parametrizations.weight.original.normal_()
    before = scale.u.clone()
    net["fc"](torch.randn(2, 5))
    assert torch.equal(scale.u, before)
    net.train()["fc"](torch.randn(2, 5))
    assert not torch.equal(scale.u, before)


def test_direction_and_scale_get_gradients_and_the_scale_is_a_matrix():
    net = reparametrise(_net()).train()
    net["out"](torch.randn(3, 6)).sum().backward()
    scale = net["out"].parametrizations.weight[0].raw
    assert scale.shape == (1, 1)  # so that weight decay, which spares vectors, reaches it
    assert scale.grad.abs() > 0
    assert net["out"].parametrizations.weight.original.grad.abs().sum() > 0


def test_a_forward_pass_may_be_repeated_before_the_first_ones_backward_pass():
    net = reparametrise(_net()).train()
    first = net["out"](torch.randn(3, 6))
    net["out"](torch.randn(3, 6))  # takes a power step
    first.sum().backward()
    assert net["out"].parametrizations.weight.original.grad is not None


def test_folding_and_baking_give_the_outputs_of_the_parametrised_model():
    net = reparametrise(_net(), glu=["w12"]).train()
    x = torch.randn(3, 8)
    for _ in range(3):
        net["w12"](net["qkv"](x)[:, :8])
    net.eval()
    with torch.no_grad():
        before = net["w12"](x), net["qkv"](x)
        plain = _net()
        plain.load_state_dict(baked(net.state_dict()))
        folded = fold(copy.deepcopy(net))
        assert sorted(folded.state_dict()) == sorted(plain.state_dict())
        for other in (plain, folded):
            torch.testing.assert_close((other["w12"](x), other["qkv"](x)), before)


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="versions 1 and 2, not 3"):
        reparametrise(_net(), version=3)
