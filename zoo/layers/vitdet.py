"""Windowed attention in most blocks of a plain transformer (ViTDet, 2203.16527, section 3).

The layout comes as arguments and nothing is stored between calls, so a model can be exported, and
called again while it runs.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class VitDet:
    """Which blocks attend inside windows, and how large these are.

    Of each period of blocks the last one is global, and so is the last block of all.

    Args:
        window: Side of a window, in patches.
        num_windowed: Windowed blocks before each global one.
        num_global: Global blocks in all, if `num_windowed` is not given.
    """

    window: int
    num_windowed: int | None = None
    num_global: int | None = None

    def __post_init__(self):
        if (self.num_windowed is None) == (self.num_global is None):
            raise ValueError(
                f"num_windowed is {self.num_windowed} and num_global {self.num_global}; "
                "give one of the two."
            )
        counts = dict(window=(self.window, 1), num_global=(self.num_global, 1))
        for name, (value, least) in (counts | dict(num_windowed=(self.num_windowed, 0))).items():
            if value is not None and value < least:
                raise ValueError(f"{name} {value} is too small; {least} is the least.")

    def is_global(self, block: int, depth: int) -> bool:
        """Tell whether a block of a model with `depth` blocks sees the whole image."""
        if self.num_windowed is not None:
            period = self.num_windowed + 1
        else:
            assert self.num_global is not None  # __post_init__ saw to it
            period = max(1, depth // self.num_global)
        return block % period == period - 1 or block == depth - 1


def to_window_order(
    x: Float[Tensor, "B N C"], rows: int, cols: int, window: int
) -> Float[Tensor, "B N C"]:
    """Reorder raster tokens: windows in raster order, and in raster order inside each."""
    batch, _, chs = x.shape
    x = x.view(batch, rows // window, window, cols // window, window, chs)
    return x.transpose(2, 3).reshape(batch, rows * cols, chs)


def to_raster_order(
    x: Float[Tensor, "B N C"], rows: int, cols: int, window: int
) -> Float[Tensor, "B N C"]:
    """Undo `to_window_order`."""
    batch, _, chs = x.shape
    x = x.view(batch, rows // window, cols // window, window, window, chs)
    return x.transpose(2, 3).reshape(batch, rows * cols, chs)
