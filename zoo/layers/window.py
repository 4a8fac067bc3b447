"""Cut a map into windows and put it together again."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rows_and_cols(size: int | Sequence[int]) -> tuple[int, int]:
    """Read a size as users give it: one side of a square, or rows and columns."""
    rows, cols = (size, size) if isinstance(size, int) else size
    return rows, cols


def pad_to_multiple(x: Float[Tensor, "B C H W"], multiple: int) -> Float[Tensor, "B C h w"]:
    """Append zeros at the right and the bottom until both sides divide by `multiple`."""
    rows, cols = x.shape[-2:]
    bottom, right = -rows % multiple, -cols % multiple
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


# Both functions go through [B H W C]: reshaping a map as [B C H W] would leave its channels first,
# here or in the gradient, and every convolution before or after would copy it.


def to_windows(x: Float[Tensor, "B C H W"], window: int) -> Float[Tensor, "windows N C"]:
    """Cut a map into square windows: rows of windows first, raster order inside each."""
    batch, chs, rows, cols = x.shape
    x = x.permute(0, 2, 3, 1)
    x = x.view(batch, rows // window, window, cols // window, window, chs)
    return x.transpose(2, 3).reshape(-1, window * window, chs)


def from_windows(
    x: Float[Tensor, "windows N C"], window: int, rows: int, cols: int
) -> Float[Tensor, "B C rows cols"]:
    """Undo `to_windows` for a map of `rows` x `cols`."""
    chs = x.shape[-1]
    x = x.view(-1, rows // window, cols // window, window, window, chs)
    return x.transpose(2, 3).reshape(-1, rows, cols, chs).permute(0, 3, 1, 2)


def padding_bias(
    x: Float[Tensor, "B C h w"], rows: int, cols: int, window: int
) -> Float[Tensor, "windows 1 1 N"] | None:
    """Return a bias that hides what `pad_to_multiple` appended to a map of `rows` x `cols`.

    For one image: -inf for the padding cells, else 0; `None` if nothing was appended.
    """
    bottom, right = x.shape[-2] - rows, x.shape[-1] - cols
    if not (bottom or right):
        return None
    cells = F.pad(x.new_zeros(1, 1, rows, cols), (0, right, 0, bottom), value=-math.inf)
    return to_windows(cells, window).view(-1, 1, 1, window**2)
