"""The convolution over three tokens with its SiLU: in torch, as an operator, in kernels."""

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import short_conv as short_conv_op
from zoo.layers.short_conv import short_conv_silu

SIZES = [(3, 49, 20), (5, 1, 12), (2, 35, 6), (9, 196, 784)]


def inputs_of(sizes, *, dtype=torch.float32, device="cpu"):
    x, taps = torch.randn(sizes, device=device), torch.randn(sizes[2], 3, device=device)
    return [t.to(dtype).requires_grad_() for t in (x, taps)]


def gradients_to(sizes, *, dtype=torch.float32, device="cpu"):
    """One of them a slice of something wider, as a mixer gives."""
    half = sizes[2] // 2
    dfirst, dlast = torch.randn(2, *sizes[:2], 2 * half, device=device).to(dtype)
    return dfirst[..., :half].contiguous(), dlast[..., half:]


def exact(inputs, dys):
    """The same from torch's own convolution in float64."""
    x, taps = (t.detach().double().requires_grad_() for t in inputs)
    y = F.conv1d(x.transpose(1, 2), taps[:, None], padding=1, groups=len(taps)).transpose(1, 2)
    y = F.silu(y).chunk(2, dim=-1)
    return *y, *torch.autograd.grad(y, (x, taps), [dy.double() for dy in dys])


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_it_is_a_depthwise_convolution_with_silu(sizes):
    inputs, dys = inputs_of(sizes, dtype=torch.float64), gradients_to(sizes, dtype=torch.float64)
    y = short_conv_silu(*inputs)
    for ours, theirs in zip(
        (*y, *torch.autograd.grad(y, inputs, dys)), exact(inputs, dys), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_promises_the_shapes_and_dtypes_of_its_results():
    x = torch.randn(2, 7, 12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    taps = torch.randn(12, 3, device="meta", requires_grad=True)
    first, last = short_conv_op.short_conv_silu(x, taps)
    assert first.shape == last.shape == (2, 7, 6) and first.dtype == last.dtype == x.dtype
    dx, dtaps = torch.autograd.grad((first + last).sum(), (x, taps))
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert (dtaps.shape, dtaps.dtype) == (taps.shape, taps.dtype)


@pytest.mark.slow
def test_the_kernels_are_exact_in_tritons_interpreter(interpret):
    interpret(__file__)


def run_interpreted():
    """Run the kernels on the CPU: windows of one walk and of several, more than a program's."""
    from zoo.kernels.short_conv_triton import backward, forward

    torch.manual_seed(0)
    for sizes in SIZES[:3]:
        inputs, dys = inputs_of(sizes), gradients_to(sizes)
        known = exact(inputs, dys)
        x, taps = (t.detach() for t in inputs)
        found = (*forward(x, taps), *backward(*dys, x, taps))
        for ours, theirs in zip(found, known, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 3e-3), (torch.float16, 5e-4), (torch.float32, 1e-5)],
    ids=str,
)
def test_the_operator_is_exact(sizes, dtype, tolerance):
    inputs = inputs_of(sizes, dtype=dtype, device="cuda")
    dys = gradients_to(sizes, dtype=dtype, device="cuda")
    y = short_conv_silu(*inputs)
    for ours, theirs in zip(
        (*y, *torch.autograd.grad(y, inputs, dys)), exact(inputs, dys), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.gpu
def test_the_gradients_are_the_same_bits_each_time():
    inputs, dys = inputs_of(SIZES[3], device="cuda"), gradients_to(SIZES[3], device="cuda")
    y = short_conv_silu(*inputs)
    first, second = (torch.autograd.grad(y, inputs, dys, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_torch_finds_nothing_wrong_with_the_operator():
    inputs = inputs_of(SIZES[0], device="cuda")
    torch.library.opcheck(torch.ops.zoo.short_conv_silu.default, inputs)


if __name__ == "__main__":
    run_interpreted()
