"""Teachers in 8 bits: what they lose, and what is kept from them."""

import pytest
import torch
from torch import nn

from zoo.features import Batch
from zoo.kernels.int8 import int8_product
from zoo.teachers.open import open_teacher
from zoo.teachers.quantize import QuantizedLinear, quantize_layers, quantize_linears
from zoo.teachers.teacher import Frozen


def teacher() -> Frozen:
    made = open_teacher("timm:test_vit/random@64")
    assert isinstance(made, Frozen)
    return made


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(4, 3, 64, 64))


def fidelity_to(exact: Frozen, changed: Frozen, batch: Batch) -> float:
    ours, theirs = changed(batch).spatial, exact(batch).spatial
    assert ours is not None and theirs is not None
    spread = (theirs - theirs.mean((0, 1, 2))).square().mean()
    return float(spread / (ours - theirs).square().mean())


def relative(ours, theirs) -> float:
    return float((ours.float() - theirs).square().mean() / theirs.square().mean())


def test_int8_loses_an_eighth_of_what_fp8_loses_on_bell_shaped_rows():
    plain, x = nn.Linear(256, 128).requires_grad_(False), torch.randn(64, 256)
    lost = {kind: relative(QuantizedLinear(plain, kind)(x), plain(x)) for kind in ("fp8", "int8")}
    assert 5e-4 < lost["fp8"] < 2e-3  # two operands of 6e-4 each
    assert lost["int8"] < lost["fp8"] / 5


def test_int8_rows_have_a_centre_so_one_sided_inputs_lose_no_bit():
    plain = nn.Linear(256, 128).requires_grad_(False)
    x = torch.rand(64, 256) + 3
    assert relative(QuantizedLinear(plain, "int8")(x), plain(x)) < 1e-4


@pytest.mark.parametrize("bias", [True, False])
def test_the_int8_product_is_the_product(bias):
    q = torch.randint(-127, 128, (18, 32), dtype=torch.int8)
    w = torch.randint(-127, 128, (48, 32), dtype=torch.int8)
    s, c, t, total = torch.rand(18), torch.randn(18), torch.rand(48), torch.randn(48)
    b = torch.randn(48) if bias else None
    exact = s[:, None] * t * (q.double() @ w.double().T) + c[:, None] * total
    exact = exact + b if bias else exact
    ours = int8_product(q, s, c, w, t, total, b)
    assert relative(ours, exact) < 1e-5  # bfloat16 outputs


def test_all_layers_go_into_8_bits_where_the_gate_allows(batch):
    exact, changed = teacher(), teacher()
    report = quantize_linears(changed, batch, "int8")
    assert report.share == 1 and len(report.layers) == report.of > 8
    assert report.fidelity == report.all_layers > 1000
    assert fidelity_to(exact, changed, batch) == pytest.approx(report.fidelity, rel=0.01)


def test_a_part_of_the_layers_goes_where_all_would_lose_too_much(batch):
    every = quantize_linears(teacher(), batch, "fp8", gate=0.0)
    changed = teacher()
    some = quantize_linears(changed, batch, "fp8", gate=2 * every.fidelity)
    assert 0.25 <= some.share < 1 and some.fidelity >= 2 * every.fidelity
    eight = [n for n, m in changed.network.named_modules() if isinstance(m, QuantizedLinear)]
    assert sorted(eight) == sorted(some.layers)
    lost = {}  # of the features by each layer alone, for its work; all see the same tokens
    for name in every.layers:
        quantize_layers(alone := teacher(), "fp8", [name])
        size = alone.network.get_submodule(name).weight.numel()
        lost[name] = 1 / fidelity_to(teacher(), alone, batch) / size
    assert set(some.layers) == set(sorted(lost, key=lambda n: lost[n])[: len(some.layers)])


def test_a_teacher_that_loses_too_much_is_refused_with_the_figures_and_left_alone(batch):
    changed = teacher()
    before = changed(batch).spatial
    with pytest.raises(ValueError, match=r"cannot run in fp8: .*fidelity of [\d,]+ .*Take int8"):
        quantize_linears(changed, batch, "fp8", gate=1e9)
    torch.testing.assert_close(changed(batch).spatial, before, rtol=0, atol=0)


@pytest.mark.slow
def test_the_kernel_gives_what_the_product_gives(interpret):
    code = """
import torch
from zoo.kernels.int8_triton import launch, product
from zoo.kernels.int8 import int8_product
torch.manual_seed(0)
for m, n, k in ((50, 48, 96), (70, 80, 64)):
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    rest = torch.rand(m), torch.randn(m), w, torch.rand(n), torch.randn(n)
    for bias in (torch.randn(n), None):
        theirs = int8_product(q, *rest, bias).float()
        ours = launch(q, *rest, bias, kernel=product, BM=32, BN=32, BK=32, GROUP=8).float()
        assert (ours - theirs).norm() / theirs.norm() < 5e-3, (m, n, k)
"""
    interpret("-c", code)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_gpu_multiplies_in_8_bits_as_the_cpu_does(kind):
    plain, x = nn.Linear(256, 128), torch.randn(100, 256)
    layer = QuantizedLinear(plain, kind)
    slow = layer(x)
    fast = layer.cuda()(x.cuda()).cpu()
    assert relative(fast, slow.float()) < 1e-4
