"""A mixture of experts made of a dense MLP computes what the MLP does, and has it inside."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from zoo.language.moe import balance_loss, z_loss
from zoo.language.upcycle import Dense, matrix_scales, router_rows, to_dense, to_experts
from zoo.language.upcycling import Upcycling

WIDTH, DIM = 48, 64
SIZES = [
    (e, g, t)
    for e, g, t in product((1, 2, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 8, 12, 16))
    if t % g == 0 and t <= e * g
]


def dense(gated: bool = True) -> Dense:
    up, gate = torch.randn(2, WIDTH, DIM) / DIM**0.5
    return Dense(up, torch.randn(DIM, WIDTH) / WIDTH**0.5, gate if gated else None)


def run(x, up, down, gate):
    hidden = F.silu(x @ gate.mT) * (x @ up.mT) if gate is not None else F.relu(x @ up.mT) ** 2
    return hidden @ down.mT


def error(how: Upcycling, gated: bool = True, tokens: int = 256) -> float:
    """Return the distance of the mixture from the MLP, over the MLP's length."""
    mlp, gain = dense(gated), torch.rand(DIM) + 0.5
    scales = matrix_scales(how.scale, how.output_scale, gated=gated)
    experts = to_experts(mlp, how, scales)
    x = F.rms_norm(torch.randn(tokens, DIM), (DIM,)) * gain
    weights, chosen = (x @ router_rows(how, gain).T).softmax(-1).topk(how.top_k)
    if how.router == "topk-softmax":
        weights = weights / weights.sum(-1, keepdim=True)
    each = run(x, *(None if w is None else w for w in experts))  # [N tokens C]
    found = each[chosen.T, torch.arange(tokens)] * weights.T[..., None]
    wanted = run(x, *mlp)
    return ((found.sum(0) - wanted).norm() / wanted.norm()).item()


def plan(e, g, t, **more) -> Upcycling:
    return Upcycling(experts=e, groups=g, top_k=t, **more)


@pytest.mark.parametrize("gated", [True, False])
def test_topk_then_softmax_is_exact_for_any_sizes_and_any_router(gated):
    for sizes, deviation in product(SIZES, (0, 1e-3, 0.02, 0.1)):
        if deviation or sizes[1] == 1:
            found = error(plan(*sizes, deviation=deviation), gated, tokens=64)
            assert found <= 1e-6, (sizes, deviation)


def test_softmax_then_topk_errs_by_2_percent_at_most_with_logits_of_deviation_0_02():
    for sizes in SIZES:
        assert error(plan(*sizes, router="softmax-topk")) <= 0.02, sizes


@pytest.mark.parametrize(
    ("deviation", "least", "most"),
    [(0, 0, 1e-6), (1e-3, 0, 1e-3), (0.1, 0.02, 0.1), (1, 0.15, 0.5)],
)
def test_its_error_grows_with_the_deviation_of_the_logits(deviation, least, most):
    found = error(plan(8, 1, 2, router="softmax-topk", deviation=deviation))
    assert least <= found <= most


def test_the_logits_have_the_deviation_that_was_asked_for():
    gain = torch.rand(512) * 3
    x = F.rms_norm(torch.randn(1000, 512), (512,)) * gain
    rows = router_rows(plan(64, 4, 4, deviation=0.1), gain)
    assert torch.equal(rows[::4], rows[3::4])
    assert (x @ rows.T).std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("scale", "gated", "exact"),
    [
        ("cube-root", False, True),  # squared ReLU: s^(1/3) s^(2/3)
        ("cube-root", True, False),
        ("square-root", True, True),
    ],
)
def test_roots_of_the_scale_are_exact_where_no_activation_bends_them(scale, gated, exact):
    found = error(plan(8, 4, 8, scale=scale), gated)
    assert found < 1e-5 if exact else found > 0.05


@pytest.mark.parametrize("sizes", [(8, 4, 2), (8, 8, 12)])
def test_a_number_of_experts_that_would_lose_shards_is_refused(sizes):
    with pytest.raises(ValueError, match="no multiple of --groups"):
        plan(*sizes)


@pytest.mark.parametrize(
    ("sizes", "more", "words"),
    [
        ((2, 2, 8), {}, "more than the 2 x 2 experts; take 4"),
        ((8, 2, 2), dict(deviation=0), "rows that tie"),
        ((0, 1, 1), {}, "--experts is 0"),
        ((8, 2, 2), dict(deviation=float("nan")), "rows that tie"),
    ],
)
def test_what_cannot_be_is_refused(sizes, more, words):
    with pytest.raises(ValueError, match=words):
        plan(*sizes, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_the_dense_mlp_comes_back_bit_for_bit(gated, dtype):
    mlp = Dense(*(None if w is None else w.to(dtype) for w in dense(gated)))
    how = plan(8, 4, 8)
    scales = matrix_scales("down", how.output_scale, gated=gated)
    for kept in (0, 7):
        again = to_dense(to_experts(mlp, how, scales), 8, scales, kept)
        for ours, theirs in zip(again, mlp, strict=True):
            assert (ours is theirs is None) or torch.equal(ours, theirs)


def test_losses_of_routers_are_those_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    switch = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers"
    )
    logits = torch.randn(40, 8)
    chosen = logits.topk(3).indices
    theirs = mixtral.load_balancing_loss_func((logits,), 8, 3)
    torch.testing.assert_close(balance_loss(logits, chosen), theirs)
    torch.testing.assert_close(z_loss(logits), switch.router_z_loss_func(logits[None]))


def test_an_even_router_has_the_least_balance_loss():
    even = torch.eye(8).repeat(5, 1)
    assert balance_loss(even * 50, even.topk(1).indices).item() == pytest.approx(1)
    one = torch.eye(8)[:1].repeat(40, 1)
    assert balance_loss(one * 50, one.topk(1).indices).item() == pytest.approx(8)
