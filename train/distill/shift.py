"""Crops that are shifted against each other, and the positions that two of them share.

Shift-equivariant losses (C-RADIOv4, section 2.3): if student and teacher see the same place of the
image at different places of their grids, the student cannot learn what a teacher says of a grid
cell whatever is in it (borders, window edges, speckle). Each image has windows of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.data.plan import mix
from zoo.features import Batch, Features


@dataclass(frozen=True)
class Side:
    """One side of what a model sees of each image: `size` pixels of a canvas."""

    canvas: int
    size: int
    starts: tuple[int, ...]
    """The first of the pixels, for each image."""

    def cell(self, cells: int) -> Fraction:
        """Return the side of a cell in canvases, where `cells` of them share the crop."""
        return Fraction(self.size, cells * self.canvas)


Window = tuple[Side, Side]
"""Rows and columns."""


def draw_windows(
    size: tuple[int, int], grid: tuple[int, int] | None, room: Fraction, *key: int | np.ndarray
) -> Window:
    """Place the crops of a batch on their canvases, shifted by whole cells of the model's own grid.

    All canvases show the same; each has as many pixels as its model's crop takes of it.

    Args:
        size: Rows and columns of a crop, in pixels.
        grid: Cells of the crop; `None` for a model without a map, which is shifted by pixels.
        room: How much larger than the crop the canvas is, as a part of the crop.
        key: Integers that decide the draw; one of them an array, with a number for each image.
    """
    sides = []
    for number, (pixels, cells) in enumerate(zip(size, grid or size, strict=True)):
        canvas = pixels + round(pixels * room)
        steps = (canvas - pixels) * cells // pixels
        starts = mix(*key, number) % (steps + 1) * (pixels // cells)
        sides.append(Side(canvas, pixels, tuple(starts.tolist())))
    return sides[0], sides[1]


def cropped(batch: Batch, window: Window) -> Batch:
    """Cut out of each image what `window` says of it."""
    images = batch.at((window[0].canvas, window[1].canvas))
    for dim, side in enumerate(window, start=2):
        index = _on(images, side.starts)[:, None] + torch.arange(side.size, device=images.device)
        images = images.take_along_dim(index[:, :, None, None].movedim(1, dim), dim)
    return Batch(images, batch.keys, batch.labels)


def shifted(model: Callable[[Batch], Features], window: Window) -> Callable[[Batch], Features]:
    """Let a teacher look through its window."""
    return lambda batch: model(cropped(batch, window))


def overlap(
    ours: Float[Tensor, "B H W C"],
    theirs: Float[Tensor, "B h w C"],
    our_window: Window,
    their_window: Window,
) -> tuple[Float[Tensor, "B y x C"], Float[Tensor, "B y x C"], Bool[Tensor, "B y x"]]:
    """Bring two maps to the coarser of their two grids, and tell the positions Ω in both crops.

    Where the grids agree this only moves cells; otherwise the finer map is averaged with the
    triangles of bilinear interpolation with antialiasing, as `zoo.features.match_grid` does.

    Returns:
        Both maps, and for each image which cells lie whole in the other crop; what the finer map
        has at the others means nothing.
    """
    sides = zip(ours.shape[1:3], theirs.shape[1:3], our_window, their_window, strict=True)
    common = []
    for dim, (our_cells, their_cells, our_side, their_side) in enumerate(sides, start=1):
        if our_side.cell(our_cells) < their_side.cell(their_cells):
            ours, seen = _moved(ours, dim, our_side, their_side, their_cells)
        else:
            theirs, seen = _moved(theirs, dim, their_side, our_side, our_cells)
        common.append(seen)
    return ours, theirs, common[0][:, :, None] & common[1][:, None]


def _moved(
    fine: Tensor, dim: int, fine_side: Side, side: Side, cells: int
) -> tuple[Tensor, Bool[Tensor, "B new"]]:
    """Average a map to the cells of another crop along `dim`; tell which of them it covers.

    Places are integers, in units of which a fine cell has `unit`, so nothing is rounded.
    """
    fine_cells = fine.shape[dim]
    ratio = side.cell(cells) / fine_side.cell(fine_cells)
    scale = Fraction(fine_cells, side.canvas * fine_side.size)  # canvas² to fine cells
    unit = math.lcm(ratio.denominator, scale.denominator)
    step = int(ratio * unit)
    ahead = np.array(side.starts) * fine_side.canvas - np.array(fine_side.starts) * side.canvas
    first = ahead * int(scale * unit)
    begin = _on(fine, first)[:, None] + step * torch.arange(cells, device=fine.device)
    seen = (begin >= 0) & (begin + step <= fine_cells * unit)
    if step == unit and not (first % unit).any():  # cell on cell: no product rounds them
        index = (begin // unit).clamp(0, fine_cells - 1)
        return fine.take_along_dim(index[:, :, None, None].movedim(1, dim), dim), seen
    with torch.autocast(fine.device.type, enabled=False):
        weights = _triangles(begin, step, unit, fine_cells, fine.dtype)
        letters = "bnf,bfxc->bnxc" if dim == 1 else "bnf,byfc->bync"
        return torch.einsum(letters, weights, fine), seen


def _triangles(
    begin: Int[Tensor, "B new"], step: int, unit: int, cells: int, dtype: torch.dtype
) -> Float[Tensor, "B new old"]:
    """Return the weights of fine cells in coarse ones of `step` units."""
    centres = (begin.double() + step / 2) / unit
    fine = torch.arange(cells, device=begin.device) + 0.5
    weights = (1 - (fine - centres[..., None]).abs() * unit / step).clamp_min(0)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.clamp_min(torch.finfo(dtype).tiny)).to(dtype)


def _on(like: Tensor, numbers: tuple[int, ...] | np.ndarray) -> Int[Tensor, " B"]:
    """Put integers where a tensor is; nothing waits for that."""
    return torch.as_tensor(numbers).to(like.device, non_blocking=True)
