"""The convolution over three tokens with its SiLU, on a GPU as one operator.

Its backward is another, for which only the inputs are kept: compiled code would take five times as
long as moving the tokens does (H200). The kernels (zoo.kernels.short_conv_triton) are imported when
the operator first runs; nothing here needs Triton.
"""

import torch
from torch import Tensor

_lib = torch.library.Library("zoo", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define("short_conv_silu(Tensor x, Tensor taps) -> (Tensor, Tensor)", tags=_tags)
_lib.define(
    "short_conv_silu_backward(Tensor dfirst, Tensor dlast, Tensor x, Tensor taps)"
    " -> (Tensor, Tensor)",
    tags=_tags,
)


def short_conv_silu(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve [B L C] with taps of [C 3]; return its SiLU as two halves of the channels."""
    return torch.ops.zoo.short_conv_silu(x, taps)


@torch.library.impl(_lib, "short_conv_silu", "CUDA")
def _(x, taps):
    from zoo.kernels import short_conv_triton

    return short_conv_triton.forward(x.contiguous(), taps.contiguous())


@torch.library.impl(_lib, "short_conv_silu_backward", "CUDA")
def _(dfirst, dlast, x, taps):
    from zoo.kernels import short_conv_triton

    return short_conv_triton.backward(dfirst, dlast, x.contiguous(), taps.contiguous())


@torch.library.register_fake("zoo::short_conv_silu", lib=_lib)
def _(x, taps):
    shape = (*x.shape[:2], x.shape[2] // 2)
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.register_fake("zoo::short_conv_silu_backward", lib=_lib)
def _(dfirst, dlast, x, taps):
    return x.new_empty(x.shape), taps.new_empty(taps.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dfirst, dlast):
    return torch.ops.zoo.short_conv_silu_backward(dfirst, dlast, *ctx.saved_tensors)


torch.library.register_autograd("zoo::short_conv_silu", _backward, setup_context=_setup, lib=_lib)
