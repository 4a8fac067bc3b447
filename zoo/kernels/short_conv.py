"""Convolutions over three tokens with what follows them, on a GPU as one operator.

MambaVision's, with its SiLU: its backward is another operator, for which only the inputs are kept:
compiled code would take five times as long as moving the tokens does (H200). StripedHyena 2's, with
its gates: forward alone. The kernels (zoo.kernels.short_conv_triton, zoo.kernels.gated_conv_triton)
are imported when an operator first runs; nothing here needs Triton.
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


def short_conv_gates(p: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve [B T 3W], channels x2 x1 v side by side, by [3W 3]; return x2 and x1 v."""
    return torch.ops.zoo.short_conv_gates(p, taps)


def short_conv_filtered(p: Tensor, taps: Tensor, g: Tensor) -> Tensor:
    """Return x2 (g * (x1 v)) too, for filters [groups K] of a few taps, the present first."""
    return torch.ops.zoo.short_conv_filtered(p, taps, g)


def _cuda_gates(p, taps):
    from zoo.kernels import gated_conv_triton

    return gated_conv_triton.gates(p.contiguous(), taps.contiguous())


def _cuda_filtered(p, taps, g):
    from zoo.kernels import gated_conv_triton

    return gated_conv_triton.filtered(p.contiguous(), taps.contiguous(), g.contiguous())


def _empty(p):
    return p.new_empty(*p.shape[:2], p.shape[2] // 3)


register(
    "short_conv_gates(Tensor p, Tensor taps) -> (Tensor, Tensor)",
    cuda=_cuda_gates,
    fake=lambda p, taps: (_empty(p), _empty(p)),
)
register(
    "short_conv_filtered(Tensor p, Tensor taps, Tensor g) -> Tensor",
    cuda=_cuda_filtered,
    fake=lambda p, taps, g: _empty(p),
)
