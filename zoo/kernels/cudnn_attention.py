"""Attention without a bias by cuDNN's kernels, as one operator and its backward as another.

torch takes the same kernels on such a GPU. Inside an operator they are safe and cheap to compile.
Otherwise a compiler may change the layout of what the backward pass keeps, which costs a copy; and
torch, up to 2.14 at least, then runs a backward plan that was made for another layout, because it
looks plans up by queries, keys and values alone: MambaVision-T's gradients were 5 % off.
"""

import torch
from torch import Tensor

from zoo.kernels.operator import register

MAX_HEAD_DIM = 128


def runs_here(qkv: Tensor) -> bool:
    """Say whether torch would take cuDNN for [B N 3 heads D] in 16 bits: on Hopper and Blackwell.

    `torch.nn.attention.sdpa_kernel` has no effect, as on all operators here;
    `torch.use_deterministic_algorithms` has, since cuDNN's backward kernels are not deterministic.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    tokens, dim = qkv.shape[1], qkv.shape[-1]
    fits = tokens > 1 and dim % 8 == 0 and dim <= MAX_HEAD_DIM
    return fits and torch.cuda.get_device_properties(qkv.device).major in (9, 10)


def cudnn_attention(qkv: Tensor, scale: float) -> Tensor:
    """Attend: [B N 3 heads D] to [B N heads·D]."""
    return torch.ops.zoo.cudnn_attention(qkv, scale)[0]


def _heads_first(x: Tensor) -> Tensor:
    """View [B N heads D] as cuDNN's [B heads N D], or back."""
    return x.transpose(1, 2)


def _cuda(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = map(_heads_first, qkv.contiguous().unbind(2))
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, scale=scale
    )
    return out.transpose(1, 2).flatten(2), logsumexp.squeeze(-1)


def _cuda_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> Tensor:
    tokens, heads = qkv.shape[1], qkv.shape[3]
    q, k, v = map(_heads_first, qkv.contiguous().unbind(2))
    dout, out = (_heads_first(t.contiguous().unflatten(2, (heads, -1))) for t in (dout, out))
    seed = offset = torch.empty((), dtype=torch.int64, device=qkv.device)  # dropout's, not read
    tensors = (dout, q, k, v, out, logsumexp.contiguous()[..., None], seed, offset)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, None, None, None, tokens, tokens, 0.0, False, scale=scale
    )
    return torch.stack([_heads_first(t) for t in grads], 2)


def _fake(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, dim = qkv.shape
    logsumexp = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, tokens, heads * dim), logsumexp


def _fake_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    qkv, ctx.scale = inputs
    out, logsumexp = output
    ctx.save_for_backward(qkv, out, logsumexp)
    ctx.mark_non_differentiable(logsumexp)


def _backward(ctx, dout, _logsumexp):
    return torch.ops.zoo.cudnn_attention_backward(dout, *ctx.saved_tensors, ctx.scale), None


register(
    "cudnn_attention(Tensor qkv, float scale) -> (Tensor, Tensor)",
    cuda=_cuda,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
register(
    "cudnn_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor logsumexp, float scale)"
    " -> Tensor",
    cuda=_cuda_backward,
    fake=_fake_backward,
)
