"""Attention inside small windows on a GPU as one operator, and its backward as another.

The kernels (zoo.layers.attention_triton) are imported when the operator first runs; nothing here
needs Triton. Torch's own fused kernels are made for long sequences: on windows of 49 tokens they
take up to 15 times as long as moving the data does, and a bias's gradient costs them a whole
[windows heads N N].
"""

import torch
from torch import Tensor

MAX_TOKENS = 64
"""In a window: more do not stay on the chip."""

MAX_HEAD_DIM = 128

_lib = torch.library.Library("zoo", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define("window_attention(Tensor qkv, Tensor? bias, float scale) -> Tensor", tags=_tags)
_lib.define(
    "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias, float scale)"
    " -> (Tensor, Tensor)",
    tags=_tags,
)


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend: [windows N 3 heads D] and a bias of [heads N N] to [windows N heads·D]."""
    return torch.ops.zoo.window_attention(qkv, bias, scale)


@torch.library.impl(_lib, "window_attention", "CUDA")
def _(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from zoo.layers import attention_triton

    bias = None if bias is None else bias.contiguous()
    return attention_triton.forward(qkv.contiguous(), bias, scale)


@torch.library.impl(_lib, "window_attention_backward", "CUDA")
def _(dout: Tensor, qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    from zoo.layers import attention_triton

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
