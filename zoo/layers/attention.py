"""Multi-head attention over the tokens of a window or of a whole map."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.kernels.attention import (
    MAX_BIASED_HEAD_DIM,
    MAX_BIASED_TOKENS,
    MAX_HEAD_DIM,
    MAX_TOKENS,
    biased_attention,
    window_attention,
)
from zoo.kernels.available import runs_kernels
from zoo.kernels.cudnn_attention import cudnn_attention, runs_here

Attend = Callable[..., Tensor]

UNIT = 8
"""Fused kernels want the channels of a head, and the columns of a bias, in multiples of this."""


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse a width that does not split into heads.

    Raises:
        ValueError: the message names the nearest width that does.
    """
    if dim % num_heads:
        nearest = max(1, dim // num_heads) * num_heads
        raise ValueError(
            f"dim {dim} does not split into {num_heads} heads; the nearest that does is {nearest}."
        )


def _operator(qkv: Float[Tensor, "B N 3 heads D"], bias: Tensor | None) -> Attend | None:
    """Choose our operator for these tensors; `None` where torch's own attention runs.

    Ours take 16 bits, and no bias or one for all windows.
    """
    tokens, dim = qkv.shape[1], qkv.shape[-1]
    if bias is not None and bias.dim() == 4:
        return None
    if not runs_kernels(qkv, dtypes=(torch.bfloat16, torch.float16)):
        return None
    if tokens <= MAX_TOKENS and dim <= MAX_HEAD_DIM:
        return window_attention
    if bias is None:
        return (lambda qkv, _, scale: cudnn_attention(qkv, scale)) if runs_here(qkv) else None
    if tokens <= MAX_BIASED_TOKENS and dim <= MAX_BIASED_HEAD_DIM:
        return biased_attention
    return None


class Attention(nn.Module):
    """Self-attention with an optional additive bias on its logits.

    Every family's attention runs through this class, so that a faster kernel has one place to go.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        bias: Float[Tensor, "heads N N"] | Float[Tensor, "#B #heads #N N"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        if x.is_cuda and (padding := self._padding()):
            (weight, qkv_bias), proj = self._padded_weights(padding)
            x = self._attend(F.linear(x, weight, qkv_bias), bias)
            return F.linear(x, proj, self.proj.bias)
        return self.proj(self._attend(self.qkv(x), bias))

    def fuse(self) -> None:
        """On a GPU, pad the heads once instead of in each forward."""
        if self._padding() and self.qkv.weight.is_cuda:
            self.pad_heads()

    def pad_heads(self) -> None:
        """Pad the heads with zeros, in place and for good: the same function in other weights."""
        if padding := self._padding():
            (weight, bias), proj = self._padded_weights(padding)
            self.qkv, self.proj = _linear(weight, bias), _linear(proj, self.proj.bias)

    def _padding(self) -> int:
        """Channels that pad a head to a multiple of `UNIT`; 0 if the layers are not our own."""
        # What others put in their place (LoRA, 8 bits) runs as it is.
        if type(self.qkv) is not nn.Linear or type(self.proj) is not nn.Linear:
            return 0
        return -(self.proj.in_features // self.num_heads) % UNIT

    def _attend(self, x: Float[Tensor, "B N _"], bias: Tensor | None) -> Float[Tensor, "B N _"]:
        """Attend with queries, keys and values side by side."""
        batch, tokens, _ = x.shape
        qkv = x.view(batch, tokens, 3, self.num_heads, -1)
        scale = self.head_dim**-0.5
        if (attend := _operator(qkv, bias)) is not None:
            return attend(qkv, bias, scale)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if bias is not None:
            bias = (bias if bias.dim() == 4 else bias[None]).to(q.dtype)
            if x.is_cuda and (padding := -tokens % UNIT):
                # A compiler hands a bias with other rows to fused kernels, which cannot read it.
                k, v = F.pad(k, (0, 0, 0, padding)), F.pad(v, (0, 0, 0, padding))
                bias = F.pad(bias, (0, padding), value=-math.inf)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
        # Inside torch.compile torch 2.11 says that it is exporting too.
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            # Otherwise the graph keeps a view that fits only this device's kernel; ONNX refuses it.
            x = x.clone(memory_format=torch.contiguous_format)
        return x.reshape(batch, tokens, -1)

    def _padded_weights(self, padding: int) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """Return weight and bias of the projections, with `more` channels of zeros in each head.

        Heads of 49 channels, as in the large models, have no fused kernel on a GPU; those of 56
        do. Padding the weights instead of the tokens costs next to nothing.
        """
        heads = (-1, self.head_dim)
        qkv = F.pad(self.qkv.weight.unflatten(0, heads), (0, 0, 0, padding)).flatten(0, 1)
        qkv_bias = self.qkv.bias
        if qkv_bias is not None:
            qkv_bias = F.pad(qkv_bias.unflatten(0, heads), (0, padding)).flatten()
        proj = F.pad(self.proj.weight.unflatten(1, heads), (0, padding)).flatten(1)
        return (qkv, qkv_bias), proj


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a linear layer with these parameters, without a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
