"""Multi-head attention over the tokens of a window or of a whole map."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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


class Attention(nn.Module):
    """Self-attention with an optional additive bias on its logits.

    The one seam through which every family's attention runs, so that a faster kernel has one
    place to go.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        bias: Float[Tensor, "heads N N"] | Float[Tensor, "#B #heads #N N"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        batch, tokens, chs = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if bias is not None:
            bias = (bias if bias.dim() == 4 else bias[None]).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        if torch.compiler.is_exporting():
            # Else the graph keeps a view that fits only this device's kernel, and ONNX refuses it.
            x = x.clone(memory_format=torch.contiguous_format)
        return self.proj(x.reshape(batch, tokens, chs))
