"""The convolution over three tokens with its SiLU, on a GPU as one operator.

Its backward is another, for which only the inputs are kept: compiled code would take five times as
long as moving the tokens does (H200). The kernels (zoo.kernels.short_conv_triton) are imported when
the operator first runs; nothing here needs Triton.
"""

import torch
from torch import Tensor

from zoo.kernels.operator import register


def short_conv_silu(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve [B L C] with taps of [C 3]; return its SiLU as two halves of the channels."""
    return torch.ops.zoo.short_conv_silu(x, taps)


def _cuda(x, taps):
    from zoo.kernels import short_conv_triton

    return short_conv_triton.forward(x.contiguous(), taps.contiguous())


def _cuda_backward(dfirst, dlast, x, taps):
    from zoo.kernels import short_conv_triton

    return short_conv_triton.backward(dfirst, dlast, x.contiguous(), taps.contiguous())


def _fake(x, taps):
    shape = (*x.shape[:2], x.shape[2] // 2)
    return x.new_empty(shape), x.new_empty(shape)


def _fake_backward(dfirst, dlast, x, taps):
    return x.new_empty(x.shape), taps.new_empty(taps.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dfirst, dlast):
    return torch.ops.zoo.short_conv_silu_backward(dfirst, dlast, *ctx.saved_tensors)


register(
    "short_conv_silu(Tensor x, Tensor taps) -> (Tensor, Tensor)",
    cuda=_cuda,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
register(
    "short_conv_silu_backward(Tensor dfirst, Tensor dlast, Tensor x, Tensor taps)"
    " -> (Tensor, Tensor)",
    cuda=_cuda_backward,
    fake=_fake_backward,
)
