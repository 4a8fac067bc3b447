"""Crops that are shifted against each other, and the positions that two of them share.

Shift-equivariant losses (C-RADIOv4, section 2.3): if student and teacher see the same place of the
image at different places of their grids, the student cannot learn what a teacher says of a grid
cell whatever is in it (borders, window edges, speckle).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.data.plan import mix
from zoo.features import Batch, Features


@dataclass(frozen=True)
class Side:
    """One side of what a model sees: `size` pixels from `start` on, of a canvas."""

    canvas: int
    size: int
    start: int

    def cell(self, cells: int) -> Fraction:
        """Return the side of a cell in canvases, where `cells` of them share the crop."""
        return Fraction(self.size, cells * self.canvas)

    @property
    def place(self) -> Fraction:
        """Where the crop begins, in canvases."""
        return Fraction(self.start, self.canvas)


Window = tuple[Side, Side]
"""Rows and columns."""


def draw_window(
    size: tuple[int, int], grid: tuple[int, int] | None, room: Fraction, *key: int
) -> Window:
    """Place a crop of `size` on its canvas, shifted by whole cells of the model's own grid.

    All canvases show the same; each has as many pixels as its model's crop takes of it.

    Args:
        grid: Cells of the crop; `None` for a model without a map, which is shifted by pixels.
        room: How much larger than the crop the canvas is, as a part of the crop.
        key: Integers that decide the draw.
    """
    sides = []
    for number, (pixels, cells) in enumerate(zip(size, grid or size, strict=True)):
        canvas = pixels + round(pixels * room)
        steps = (canvas - pixels) * cells // pixels
        start = mix(*key, number) % (steps + 1) * (pixels // cells)
        sides.append(Side(canvas, pixels, start))
    return sides[0], sides[1]


def cropped(batch: Batch, window: Window) -> Batch:
    """Cut what `window` says out of the batch's images."""
    rows, cols = window
    images = batch.at((rows.canvas, cols.canvas))
    images = images[:, :, rows.start :, cols.start :][:, :, : rows.size, : cols.size]
    return Batch(images, batch.keys, batch.labels)


def shifted(model: Callable[[Batch], Features], window: Window) -> Callable[[Batch], Features]:
    """Let a teacher look through its window."""
    return lambda batch: model(cropped(batch, window))


def overlap(
    ours: Float[Tensor, "B H W C"],
    theirs: Float[Tensor, "B h w C"],
    our_window: Window,
    their_window: Window,
) -> tuple[Float[Tensor, "B y x C"], Float[Tensor, "B y x C"]]:
    """Bring two maps to the positions Ω that lie in both crops, on the coarser of the two grids.

    Where the grids agree this only cuts; otherwise the finer map is averaged with the triangles
    of bilinear interpolation with antialiasing, as `zoo.features.match_grid` does.
    """
    sides = zip(ours.shape[1:3], theirs.shape[1:3], our_window, their_window, strict=True)
    for dim, (our_cells, their_cells, our_side, their_side) in enumerate(sides, start=1):
        if our_side.cell(our_cells) < their_side.cell(their_cells):
            theirs, ours = _meet(theirs, ours, their_side, our_side, dim)
        else:
            ours, theirs = _meet(ours, theirs, our_side, their_side, dim)
    return ours, theirs


def _meet(
    coarse: Tensor, fine: Tensor, coarse_side: Side, fine_side: Side, dim: int
) -> tuple[Tensor, Tensor]:
    """Cut `coarse` to its cells that lie whole in the other crop; average `fine` to these."""
    cells, fine_cells = coarse.shape[dim], fine.shape[dim]
    unit, fine_unit = coarse_side.cell(cells), fine_side.cell(fine_cells)
    offset = (coarse_side.place - fine_side.place) / fine_unit  # in fine cells
    ratio = unit / fine_unit
    first = max(0, math.ceil(-offset / ratio))
    last = min(cells, math.floor((fine_cells - offset) / ratio))
    coarse = coarse.narrow(dim, first, last - first)
    begin = offset + first * ratio
    if ratio == 1 and begin.denominator == 1:
        return coarse, fine.narrow(dim, int(begin), last - first)
    weights = _triangles(float(begin), float(ratio), last - first, fine_cells, fine)
    with torch.autocast(fine.device.type, enabled=False):
        averaged = torch.movedim(fine, dim, -1) @ weights.T
    return coarse, torch.movedim(averaged, -1, dim)


def _triangles(
    begin: float, ratio: float, count: int, cells: int, like: Tensor
) -> Float[Tensor, "new old"]:
    """Return the weights of `cells` fine cells in `count` coarse ones; made on the device."""
    coarse, fine = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (count, cells))
    centres = begin + ratio * (coarse + 0.5)
    distance = (fine + 0.5 - centres[:, None]).abs()
    weights = (1 - distance / ratio).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)
