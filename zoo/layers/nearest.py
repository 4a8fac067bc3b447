"""Resize a map by its nearest cells."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_nearest(
    x: Float[Tensor, "B C H W"], rows: int, cols: int
) -> Float[Tensor, "B C rows cols"]:
    """Do what `F.interpolate(x, (rows, cols))` does, faster where one size divides the other.

    Its compiled backward pass scatters into a map with channels first; this one sums, or
    writes zeros, in a map with channels last.
    """
    high, wide = x.shape[-2:]
    if (high, wide) == (rows, cols):
        return x
    if rows % high == 0 and cols % wide == 0:
        cells = x.permute(0, 2, 3, 1)[:, :, None, :, None]
        cells = cells.expand(-1, -1, rows // high, -1, cols // wide, -1)
        return cells.reshape(-1, rows, cols, x.shape[1]).permute(0, 3, 1, 2)
    if high % rows == 0 and wide % cols == 0:
        cells = x.permute(0, 2, 3, 1)[:, :: high // rows, :: wide // cols]
        return cells.contiguous().permute(0, 3, 1, 2)
    return F.interpolate(x, (rows, cols))
