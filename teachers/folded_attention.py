"""SAM's attention with its relative positions folded into queries and keys.

SAM adds to each logit a bias that depends on the query and on the row and the column of the key
(2304.02643, after MViTv2, 2112.01526, 4.1). As a matrix it has a number for each pair of cells:
half a gigabyte for each layer and canvas, and flash kernels do not take it. But the bias of query i
at key (r, c) is a_i[r] + b_i[c], a product of (a_i, b_i) with the one-hot vectors of r and c. So
longer queries and keys give the same logits without the matrix:

    q' = (q / √d, a, b)    k' = (k, onehot r, onehot c)    q' k'ᵀ = q kᵀ / √d + a[r] + b[c]
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer_sam import Attention, get_rel_pos
from torch import Tensor, nn

MAX_HEAD_DIM = 256
"""Most channels of a head that flash kernels take."""
HEAD_MULTIPLE = 8
"""Their number of channels is a multiple of this."""


class FoldedAttention(nn.Module):
    """timm's SAM attention, frozen; the same function up to rounding.

    Maps of another size than `plain` was built for go through `plain` itself.

    Args:
        plain: An attention with relative positions of one size (a window's, or the whole map's).
    """

    row_table: Tensor
    """[rows rows C]: for each query's row and key's row, what the query is multiplied with."""
    col_table: Tensor
    """[cols cols C], the same for columns."""
    one_hot: Tensor
    """[rows·cols D]: row and column of each key, what is appended to it."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.plain = plain
        rows, cols = ((len(p) + 1) // 2 for p in (plain.rel_pos_h, plain.rel_pos_w))
        self.grid = (rows, cols)
        with torch.no_grad():
            row_table, col_table = (
                get_rel_pos(side, side, p.detach())
                for side, p in zip(self.grid, (plain.rel_pos_h, plain.rel_pos_w), strict=True)
            )
        row, col = torch.eye(rows), torch.eye(cols)
        one_hot = torch.cat([row.repeat_interleave(cols, 0), col.repeat(rows, 1)], 1)
        width = plain.head_dim + rows + cols
        one_hot = F.pad(one_hot, (0, -width % HEAD_MULTIPLE)).to(row_table)
        self.register_buffer("row_table", row_table, persistent=False)
        self.register_buffer("col_table", col_table, persistent=False)
        self.register_buffer("one_hot", one_hot, persistent=False)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        plain, (rows, cols) = self.plain, self.grid
        if x.shape[1:3] != self.grid:
            return plain(x)
        heads, images, cells = plain.num_heads, len(x), rows * cols
        qkv = plain.qkv(x).view(images, cells, 3, heads, plain.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = plain.q_norm(q), plain.k_norm(k)
        q_map = q.unflatten(2, (rows, cols))
        a = torch.einsum("bnhwc,hkc->bnhwk", q_map, self.row_table.to(q.dtype))
        b = torch.einsum("bnhwc,wkc->bnhwk", q_map, self.col_table.to(q.dtype))
        one_hot = self.one_hot.to(q.dtype).expand(images, heads, -1, -1)
        long_k = torch.cat([k, one_hot], -1)
        padding = long_k.shape[-1] - plain.head_dim - rows - cols
        bias = F.pad(torch.cat([a, b], -1).flatten(2, 3), (0, padding)).to(q.dtype)
        long_q = torch.cat([q * plain.scale, bias], -1)
        v = F.pad(v, (0, long_k.shape[-1] - plain.head_dim))
        out = F.scaled_dot_product_attention(long_q, long_k, v, scale=1.0)
        out = out[..., : plain.head_dim].transpose(1, 2).flatten(2)
        return plain.proj_drop(plain.proj(out)).view(x.shape)


def fold_relative_positions(network: nn.Module) -> int:
    """Fold every attention of timm's SAM in `network`, in place, and return their number.

    Left alone are those whose heads would become too wide for flash kernels.
    """
    found = [
        (parent, name, child)
        for parent in network.modules()
        if not isinstance(parent, FoldedAttention)
        for name, child in parent.named_children()
        if isinstance(child, Attention) and child.use_rel_pos
    ]
    count = 0
    for parent, name, child in found:
        rows, cols = ((len(p) + 1) // 2 for p in (child.rel_pos_h, child.rel_pos_w))
        if child.head_dim + rows + cols <= MAX_HEAD_DIM:
            setattr(parent, name, FoldedAttention(child))
            count += 1
    return count
