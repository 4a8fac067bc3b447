"""Attention inside windows on a GPU, as operators with operators for their backward pass.

The kernels (zoo.kernels.attention_triton, zoo.kernels.attention_tiles_triton) are imported when an
operator first runs; nothing here needs Triton. Torch's own fused kernels are made for long
sequences: on windows of 49 tokens they take up to 15 times as long as moving the data does, and
for a bias's gradient they write a whole [windows heads N N].
"""

import torch
from torch import Tensor

from zoo.kernels.operator import register

MAX_TOKENS = 64
"""Most tokens of a window for `window_attention`: more do not stay on the chip."""

MAX_HEAD_DIM = 128

MAX_BIASED_TOKENS = 256
"""Most tokens of a window for `biased_attention`, which sums a bias's gradient by rows."""

MAX_BIASED_HEAD_DIM = 96
"""Most channels of a head there: more need more shared memory than many GPUs have."""


def window_attention(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend inside windows of at most `MAX_TOKENS` tokens.

    Args:
        qkv: [windows N 3 heads D].
        bias: [heads N N], added to the logits of all windows.
        scale: Of the logits, before the bias.

    Returns:
        [windows N heads·D].
    """
    return torch.ops.zoo.window_attention(qkv, bias, scale)


def _window_cuda(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    from zoo.kernels import attention_triton

    bias = None if bias is None else bias.contiguous()
    return attention_triton.forward(qkv.contiguous(), bias, scale)


def _window_cuda_backward(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    from zoo.kernels import attention_triton

    like = bias
    bias = None if bias is None else bias.contiguous()
    dqkv, dbias = attention_triton.backward(dout.contiguous(), qkv.contiguous(), bias, scale)
    if dbias is None or like is None:
        return dqkv, qkv.new_empty(0)
    return dqkv, dbias.to(like.dtype)


def _window_fake(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    windows, tokens, _, heads, dim = qkv.shape
    return qkv.new_empty(windows, tokens, heads * dim)


def _window_fake_backward(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dbias = qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return qkv.new_empty(qkv.shape), dbias


def _window_setup(ctx, inputs, output):
    qkv, bias, ctx.scale = inputs
    ctx.save_for_backward(qkv, bias)


def _window_backward(ctx, dout):
    qkv, bias = ctx.saved_tensors
    dqkv, dbias = torch.ops.zoo.window_attention_backward(dout, qkv, bias, ctx.scale)
    return dqkv, None if bias is None else dbias, None


def biased_attention(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend as `window_attention`, always with a bias, in windows of up to 256 tokens."""
    return torch.ops.zoo.biased_attention(qkv, bias, scale)[0]


def _biased_cuda(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from zoo.kernels import attention_tiles_triton

    return attention_tiles_triton.forward(qkv.contiguous(), bias.contiguous(), scale)


def _biased_cuda_backward(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from zoo.kernels import attention_tiles_triton

    dout, qkv, whole = dout.contiguous(), qkv.contiguous(), bias.contiguous()
    dqkv, dbias = attention_tiles_triton.backward(dout, qkv, whole, out, logsumexp, scale)
    return dqkv, dbias.to(bias.dtype)


def _biased_fake(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    windows, tokens, _, heads, dim = qkv.shape
    logsumexp = qkv.new_empty(windows, heads, tokens, dtype=torch.float32)
    return qkv.new_empty(windows, tokens, heads * dim), logsumexp


def _biased_fake_backward(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _biased_setup(ctx, inputs, output):
    qkv, bias, ctx.scale = inputs
    out, logsumexp = output
    ctx.save_for_backward(qkv, bias, out, logsumexp)
    ctx.mark_non_differentiable(logsumexp)


def _biased_backward(ctx, dout, _logsumexp):
    grads = torch.ops.zoo.biased_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return *grads, None


register(
    "window_attention(Tensor qkv, Tensor? bias, float scale) -> Tensor",
    cuda=_window_cuda,
    fake=_window_fake,
    setup=_window_setup,
    backward=_window_backward,
)
register(
    "window_attention_backward(Tensor dout, Tensor qkv, Tensor? bias, float scale)"
    " -> (Tensor, Tensor)",
    cuda=_window_cuda_backward,
    fake=_window_fake_backward,
)
register(
    "biased_attention(Tensor qkv, Tensor bias, float scale) -> (Tensor, Tensor)",
    cuda=_biased_cuda,
    fake=_biased_fake,
    setup=_biased_setup,
    backward=_biased_backward,
)
register(
    "biased_attention_backward(Tensor dout, Tensor qkv, Tensor bias, Tensor out, Tensor logsumexp,"
    " float scale) -> (Tensor, Tensor)",
    cuda=_biased_cuda_backward,
    fake=_biased_fake_backward,
)
