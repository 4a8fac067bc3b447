"""Attention inside windows on a GPU as operators, and their backward as others.

The kernels (zoo.kernels.attention_triton, zoo.kernels.attention_tiles_triton) are imported when an
operator first runs; nothing here needs Triton. Torch's own fused kernels are made for long
sequences: on windows of 49 tokens they take up to 15 times as long as moving the data does, and a
bias's gradient costs them a whole [windows heads N N].
"""

import torch
from torch import Tensor

MAX_TOKENS = 64
"""In a window: more do not stay on the chip."""

MAX_HEAD_DIM = 128

MAX_BIASED_TOKENS = 256
"""In a window with a bias, whose gradient a program sums for its rows."""

MAX_BIASED_HEAD_DIM = 96
"""In such a window: more take more shared memory than many GPUs have."""

_lib = torch.library.Library("zoo", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define("window_attention(Tensor qkv, Tensor? bias, float scale) -> Tensor", tags=_tags)
_lib.define(
    "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias, float scale)"
    " -> (Tensor, Tensor)",
    tags=_tags,
)


_lib.define(
    "biased_attention(Tensor qkv, Tensor bias, float scale) -> (Tensor, Tensor)", tags=_tags
)
_lib.define(
    "biased_attention_backward(Tensor dout, Tensor qkv, Tensor bias, Tensor out, Tensor sums,"
    " float scale) -> (Tensor, Tensor)",
    tags=_tags,
)


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend: [windows N 3 heads D] and a bias of [heads N N] to [windows N heads·D]."""
    return torch.ops.zoo.window_attention(qkv, bias, scale)


@torch.library.impl(_lib, "window_attention", "CUDA")
def _(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from zoo.kernels import attention_triton

    bias = None if bias is None else bias.contiguous()
    return attention_triton.forward(qkv.contiguous(), bias, scale)


@torch.library.impl(_lib, "window_attention_backward", "CUDA")
def _(dout: Tensor, qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    from zoo.kernels import attention_triton

    like = bias
    bias = None if bias is None else bias.contiguous()
    dqkv, dbias = attention_triton.backward(dout.contiguous(), qkv.contiguous(), bias, scale)
    if dbias is None or like is None:
        return dqkv, qkv.new_empty(0)
    return dqkv, dbias.to(like.dtype)


@torch.library.register_fake("zoo::window_attention", lib=_lib)
def _(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    windows, tokens, _, heads, dim = qkv.shape
    return qkv.new_empty(windows, tokens, heads * dim)


@torch.library.register_fake("zoo::window_attention_backward", lib=_lib)
def _(dout: Tensor, qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    dbias = qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return qkv.new_empty(qkv.shape), dbias


def _setup(ctx, inputs, output):
    qkv, bias, ctx.scale = inputs
    ctx.save_for_backward(qkv, bias)


def _backward(ctx, dout):
    qkv, bias = ctx.saved_tensors
    dqkv, dbias = torch.ops.zoo.window_attention_backward(dout, qkv, bias, ctx.scale)
    return dqkv, None if bias is None else dbias, None


torch.library.register_autograd("zoo::window_attention", _backward, setup_context=_setup, lib=_lib)


def biased_attention(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend in larger windows: as `window_attention`, with a bias."""
    return torch.ops.zoo.biased_attention(qkv, bias, scale)[0]


@torch.library.impl(_lib, "biased_attention", "CUDA")
def _(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from zoo.kernels import attention_tiles_triton

    return attention_tiles_triton.forward(qkv.contiguous(), bias.contiguous(), scale)


@torch.library.impl(_lib, "biased_attention_backward", "CUDA")
def _(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from zoo.kernels import attention_tiles_triton

    dout, qkv, whole = dout.contiguous(), qkv.contiguous(), bias.contiguous()
    dqkv, dbias = attention_tiles_triton.backward(dout, qkv, whole, out, sums, scale)
    return dqkv, dbias.to(bias.dtype)


@torch.library.register_fake("zoo::biased_attention", lib=_lib)
def _(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    windows, tokens, _, heads, dim = qkv.shape
    sums = qkv.new_empty(windows, heads, tokens, dtype=torch.float32)
    return qkv.new_empty(windows, tokens, heads * dim), sums


@torch.library.register_fake("zoo::biased_attention_backward", lib=_lib)
def _(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _setup_biased(ctx, inputs, output):
    qkv, bias, ctx.scale = inputs
    out, sums = output
    ctx.save_for_backward(qkv, bias, out, sums)
    ctx.mark_non_differentiable(sums)


def _backward_biased(ctx, dout, _sums):
    grads = torch.ops.zoo.biased_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return *grads, None


torch.library.register_autograd(
    "zoo::biased_attention", _backward_biased, setup_context=_setup_biased, lib=_lib
)
