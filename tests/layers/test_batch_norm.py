"""Batch norm, activation and residual as one operator."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from zoo.kernels import batch_norm as batch_norm_op
from zoo.layers.conv import ConvNorm
from zoo.layers.stage import ConvBlock, Stage

ACTS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


def maps(chs, width, *, dtype=torch.float32, device="cpu", sides=(5, 3), batch=3):
    """Make x with a mean far from zero and padded to `width`, a residual, and a gradient."""
    shape = (batch, width, *sides)
    x, plus, dy = (torch.randn(shape, device=device) for _ in range(3))
    x += 5 * torch.randn(width, device=device)[:, None, None]
    x[:, chs:] = 0
    last = dict(dtype=dtype, memory_format=torch.channels_last)
    return [t.to(**last) for t in (x, plus, dy)]


def exact(x, weight, bias, plus, scale, act, dy, chs):
    """The same from torch's own parts in float64: result, statistics and gradients."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, plus)]
    x, weight, bias, plus = leaves
    mean, var = torch.zeros(2, chs, dtype=torch.float64, device=x.device)
    z = F.batch_norm(x[:, :chs], mean, var, weight, bias, True, 1.0, 1e-5)
    y = ACTS[act](z) * scale.double()[:, None, None, None]
    padded = [F.pad(t, (0, 0, 0, 0, 0, dy.shape[1] - t.shape[1])) for t in (y, plus)]
    y = padded[0] + padded[1]
    count = z.numel() / chs
    return [y, mean, var * (count - 1) / count, *torch.autograd.grad(y, leaves, dy.double())]


def compare(found, wanted, tolerance):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        ours, theirs = ours.double(), theirs.double()
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


def check(act, chs, width, out, *, device, dtype, tolerance, **sizes):
    """Compare the kernels with `exact`; `out` channels come back."""
    from zoo.kernels.batch_norm_triton import backward, forward

    torch.manual_seed(0)
    x, plus, dy = maps(chs, width, dtype=dtype, device=device, **sizes)
    last = dict(memory_format=torch.channels_last)
    plus, dy = plus[:, :chs].contiguous(**last), dy[:, :out].contiguous(**last)
    weight, bias = 1 + 0.1 * torch.randn(2, chs, device=device)
    scale = torch.rand(len(x), device=device) + 0.5
    y, mean, var = forward(x, weight, bias, plus, scale, act, 1e-5, out)
    grads = backward(dy, x, mean, var, weight, bias, scale, act, 1e-5)
    wanted = exact(x, weight, bias, plus, scale, act, dy, chs)
    compare((y, mean, var, *grads), wanted[:6], tolerance)
    assert not y[:, chs:].any() and not grads[0][:, chs:].any()


def run_interpreted():
    """Run the kernels on the CPU, with each activation, padded or not."""
    from zoo.kernels import batch_norm_triton

    batch_norm_triton.TILE = 64  # several tiles for each program
    for act in ACTS:
        check(act, 20, 32, 20, device="cpu", dtype=torch.float32, tolerance=1e-5)
    check("gelu", 20, 32, 32, device="cpu", dtype=torch.float32, tolerance=1e-5)
    check("silu", 16, 16, 16, device="cpu", dtype=torch.float32, tolerance=1e-5)
    # Three columns of tiles; then rows of several pixels, all of one image or of several.
    check("relu", 90, 96, 96, device="cpu", dtype=torch.float32, tolerance=1e-5)
    for sides in ((4, 2), (3, 3)):
        sizes = dict(sides=sides, batch=2)
        check("gelu", 90, 96, 90, device="cpu", dtype=torch.float32, tolerance=1e-5, **sizes)


def run_stage_interpreted():
    """A stage with padded maps, even where some norms are frozen, is the plain stage.

    The plain one is in float64: a bias before a norm has a gradient of zero, and float32 leaves
    noise there that differs from machine to machine.
    """
    from zoo.kernels import batch_norm_triton
    from zoo.layers import conv

    def of_maps(kernels):
        last = dict(memory_format=torch.channels_last)
        turned = lambda t: t.contiguous(**last) if getattr(t, "ndim", 0) == 4 else t  # noqa: E731
        return lambda *inputs: kernels(*map(turned, inputs))

    lib = torch.library.Library("zoo", "FRAGMENT")
    lib.impl("batch_norm_act", of_maps(batch_norm_triton.forward), "CPU")
    lib.impl("batch_norm_act_backward", of_maps(batch_norm_triton.backward), "CPU")
    plain = conv._in_16_bits
    for frozen in ((), (0,), (1,), (0, 3), (2, 3)):
        results = []
        for fused in (False, True):
            torch.manual_seed(0)
            blocks = [ConvBlock(20, 0.0, act=nn.GELU) for _ in range(2)]
            stage = Stage(blocks, nn.Identity()).to(memory_format=torch.channels_last)
            norms = [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
            for i in frozen:
                norms[i].eval()
            x = torch.randn(2, 20, 4, 3).contiguous(memory_format=torch.channels_last)
            conv._in_16_bits = (lambda x: True) if fused else plain
            conv.runs_kernels = lambda x: True
            if not fused:
                stage, x = stage.double(), x.double()
            y = stage(x.requires_grad_())
            grads = torch.autograd.grad(y.square().sum(), [x, *stage.parameters()])
            results.append([y, *grads, *(t for norm in norms for t in norm.buffers())])
        theirs, ours = results
        compare(ours, theirs, 1e-5)


@pytest.mark.slow
def test_the_kernels_are_exact_in_tritons_interpreter(interpret):
    interpret(__file__)


def test_activations_have_the_names_of_the_kernels():
    assert {batch_norm_op.name_of(act) for act in ACTS.values()} == set(ACTS)
    assert batch_norm_op.name_of(nn.Tanh()) is None


def test_it_stands_for_a_norm_only_while_that_learns_from_the_batch():
    norm = nn.BatchNorm2d(4)
    assert batch_norm_op.can_stand_for(norm)
    assert not batch_norm_op.can_stand_for(nn.BatchNorm2d(4).eval())
    assert not batch_norm_op.can_stand_for(nn.BatchNorm2d(4, momentum=None))
    assert not batch_norm_op.can_stand_for(nn.SyncBatchNorm(4))


def test_shapes_and_layouts_are_known_without_a_gpu():
    x = torch.empty(2, 32, 5, 3, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = nn.BatchNorm2d(20, device="meta")
    y = batch_norm_op.learn(norm, x, "gelu", 20, plus=x[:, :20])
    assert y.shape == (2, 20, 5, 3) and y.is_contiguous(memory_format=torch.channels_last)
    dx, dweight = torch.autograd.grad(y.sum(), [x, norm.weight])
    assert dx.shape == x.shape and dweight.dtype == torch.float32


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="several values"):
        batch_norm_op.learn(nn.BatchNorm2d(4), torch.zeros(1, 4, 1, 1), "none", 4)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "widths", [(64, 64, 64), (196, 208, 196), (196, 208, 208), (392, 400, 392)]
)
def test_on_a_gpu_result_and_gradients_are_those_of_float64(act, widths):
    check(
        act, *widths, device="cuda", dtype=torch.bfloat16, tolerance=5e-3, sides=(33, 31), batch=9
    )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(20, 20), (24, 40)])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_a_unit_learns_as_torchs_does(size, compiled):
    """Output, gradients and running statistics, with a bias before the norm and drop path.

    A compiler draws other numbers, so drop path is left out there.
    """
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        unit = ConvNorm(*size, bias=True, act=nn.GELU).cuda().to(memory_format=torch.channels_last)
        nn.init.normal_(unit.conv.bias)
        x = torch.randn(4, size[0], 9, 7, device="cuda").to(memory_format=torch.channels_last)
        plus = torch.randn(4, size[1], 9, 7, device="cuda").to(memory_format=torch.channels_last)
        drop = None if compiled else DropPath(0.5)
        dtype = torch.bfloat16 if fused else torch.float32
        x, plus = (t.to(dtype).requires_grad_() for t in (x, plus))
        step = torch.compile(unit, fullgraph=True) if compiled and fused else unit
        with torch.autocast("cuda", dtype) if fused else nullcontext():
            torch.manual_seed(1)
            y = step(x, plus=plus, drop_path=drop)
        grads = torch.autograd.grad(y.float().square().sum(), [x, plus, *unit.parameters()])
        norm = unit.norm
        results.append([y, norm.running_mean, norm.running_var, norm.num_batches_tracked, *grads])
    theirs, ours = results
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= 5e-2 * b.float().norm() + 0.1


if __name__ == "__main__":
    run_interpreted()
    run_stage_interpreted()
