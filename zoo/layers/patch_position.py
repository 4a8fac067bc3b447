"""One learned grid of patch positions for every image size (cropped position embedding).

The grid covers the largest image. At inference it is resized to the image; in training each image
sees a random window of it, stretched to the image's grid, so that no position belongs to one
resolution (the "CPE" of AM-RADIO, 2312.06709).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Grid = Float[Tensor, "1 cells C"]
"""A square of positions, row-major."""

SMALLEST_AREA = 0.1
"""Area of the smallest square window, as a part of the grid's."""

WIDEST_ASPECT = 4 / 3
"""The largest factor a: a window's columns are multiplied and its rows divided by it."""


class CropDraws(NamedTuple):
    """Uniform draws in [0, 1) that choose one window for each image."""

    scale: Float[Tensor, "B 1 1"]
    aspect: Float[Tensor, "B 1 1"]
    position: Float[Tensor, "B 1 1 2"]
    """(column, row) of the window's upper left corner."""


def draw_crops(batch: int, device: torch.device | None = None) -> CropDraws:
    """Draw from torch's global generator: scale, aspect, position, in this order."""
    draw = torch.rand
    return CropDraws(
        draw(batch, 1, 1, device=device),
        draw(batch, 1, 1, device=device),
        draw(batch, 1, 1, 2, device=device),
    )


def _side(cells: int) -> int:
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"A grid of {cells} positions is not a square; {side * side} would be.")
    return side


def _as_map(grid: Grid) -> Float[Tensor, "1 C side side"]:
    """Return the grid as a map in float32, as the published models interpolate at any precision."""
    side = _side(grid.shape[1])
    return grid.float().view(1, side, side, -1).permute(0, 3, 1, 2)


def resized_positions(
    grid: Grid, rows: int, cols: int, *, align_corners: bool
) -> Float[Tensor, "1 N C"]:
    """Return the positions of a `rows` x `cols` image at inference.

    The grid is resized to a square of the larger side, whose upper left part is taken: a wide
    image has the columns of a square one, and its first rows.

    Args:
        align_corners: Of the bilinear resize. It belongs to the weights: those released before
            July 2025 were made with `True`, later ones with `False`.
    """
    side = max(rows, cols)
    x = _as_map(grid)
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bilinear", align_corners=align_corners)
    return x[..., :rows, :cols].flatten(2).transpose(1, 2).to(grid.dtype)


def cropped_positions(grid: Grid, rows: int, cols: int, draws: CropDraws) -> Float[Tensor, "B N C"]:
    """Return the positions of each image of a training batch, from its own random window.

    The window's sides, relative to the grid's, are s·a (columns) and s/a (rows), at most 1; s is
    uniform in [√0.1, 1] and a log-uniform in [3/4, 4/3].
    """
    least = math.sqrt(SMALLEST_AREA)
    widest = math.log(WIDEST_ASPECT)
    scale = least + draws.scale * (1 - least)
    aspect = torch.exp(2 * widest * draws.aspect - widest)
    extent = torch.stack((scale * aspect, scale / aspect), dim=-1).clamp(0, 1)
    corner = draws.position * (1 - extent)

    x = _as_map(grid)
    along = [torch.linspace(0, 1, n, device=x.device, dtype=x.dtype) for n in (cols, rows)]
    points = torch.stack(torch.meshgrid(*along, indexing="xy"), dim=-1)
    points = points * extent.to(x) + corner.to(x)  # [B rows cols 2] in the unit square
    x = F.grid_sample(
        x.expand(points.shape[0], -1, -1, -1), 2 * points - 1, mode="bilinear", align_corners=True
    )
    return x.flatten(2).transpose(1, 2).to(grid.dtype)


def regridded_positions(grid: Grid, cells: int) -> Float[Tensor, "1 N C"]:
    """Resample the grid of a weight file to `cells` positions, once, when it is loaded."""
    if grid.shape[1] == cells:
        return grid
    side = _side(cells)
    x = F.interpolate(_as_map(grid), (side, side), mode="bicubic", align_corners=True)
    return x.flatten(2).transpose(1, 2).to(grid.dtype)
