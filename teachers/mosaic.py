"""Mosaic: many small images in one canvas of a teacher that takes a single resolution.

RADIOv2.5 (2412.07679) packs k x k images into the canvas of SAM, and C-RADIOv4 into SAM 3's, so
that the teacher runs once for k² images and its map is cut back into theirs. Its cost for an image
falls k² times; what an image's neighbours change in its features is the border effect
(`border_effect`). A canvas has no summary of its own images, so a mosaic gives none.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features
from zoo.teachers.teacher import Frozen


class Mosaic(nn.Module):
    """A teacher that looks at `k` x `k` images at once, each in a tile of its canvas.

    Args:
        teacher: Looks at the canvas, in its own size.
        k: Images along a side. A last canvas that is not full is filled with images of the batch.

    Raises:
        ValueError: the teacher has no map, or the canvas or its tiles do not divide by its stride.
    """

    summary_dim: int | None = None
    grid: tuple[int, int] | None
    license: str | None

    def __init__(self, teacher: Frozen, k: int):
        super().__init__()
        check_tiles(teacher, k)
        assert teacher.grid is not None
        self.teacher, self.k = teacher, k
        self.name, self.license = f"{teacher.name} {k}x{k}", teacher.license
        self.size = (teacher.size[0] // k, teacher.size[1] // k)
        self.grid = (teacher.grid[0] // k, teacher.grid[1] // k)
        self.spatial_dim = teacher.spatial_dim

    def train(self, mode: bool = True) -> "Mosaic":
        """Stay in eval mode: a teacher has no other."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Features:
        tiles = batch.at(self.size, self.teacher.interpolation)
        seen = self.teacher(Batch(pack(tiles, self.k)))
        return Features(None, cut(seen.spatial, self.k)[: len(tiles)])


def pack(tiles: Float[Tensor, "B 3 h w"], k: int) -> Float[Tensor, "n 3 H W"]:
    """Lay images out in canvases of k x k, row by row; the first ones again fill up the last."""
    canvases = -(-len(tiles) // (k * k))
    places = torch.arange(canvases * k * k, device=tiles.device) % len(tiles)
    grid = tiles[places].unflatten(0, (canvases, k, k))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def cut(canvas: Float[Tensor, "n H W C"], k: int) -> Float[Tensor, "B h w C"]:
    """Undo `pack` on maps: one map a tile, those of filled-up tiles included."""
    rows, cols = canvas.shape[1] // k, canvas.shape[2] // k
    tiles = canvas.unflatten(2, (k, cols)).unflatten(1, (k, rows))
    return tiles.transpose(2, 3).flatten(0, 2)


def check_tiles(teacher: Frozen, k: int) -> None:
    """Hold the canvas and its tiles against the teacher's stride.

    Raises:
        ValueError: they do not divide; the nearest sizes that do are named.
    """
    if teacher.grid is None:
        raise ValueError(f"The teacher {teacher.name} has no spatial output to cut a mosaic from.")
    if k < 2:
        raise ValueError(f"mosaic={k}: a mosaic has at least 2 images along a side.")
    for side, cells in zip(teacher.size, teacher.grid, strict=True):
        stride = round(side / cells)
        if side != stride * cells:
            near = side // stride * stride
            raise ValueError(
                f"{teacher.name} gives {cells} cells on {side} px, which is no whole stride; "
                f"take @{near} or @{near + stride} for a mosaic."
            )
        if side % (k * stride):
            fits = [n for n in range(2, cells + 1) if cells % n == 0]
            below, above = side // (k * stride) * k * stride, -(-side // (k * stride)) * k * stride
            sizes = " or ".join(f"@{s}" for s in (below, above) if s)
            counts = f"mosaic={min(fits, key=lambda n: abs(n - k))}, or " if fits else ""
            raise ValueError(
                f"{teacher.name} cannot see {k}x{k} images in {side} px: tiles of {side / k:g} px "
                f"do not divide by its stride of {stride} px. Take {counts}{sizes}."
            )


class BorderEffect(NamedTuple):
    """How near the features in a mosaic are to those of an image in all tiles of its canvas."""

    fidelity: float
    """tr Σ / (C · MSE) over all cells; infinite where neighbours change nothing."""
    inner: float
    """The same over the cells that touch no border of their tile."""
    cosine: float
    """Mean over all cells."""


@torch.no_grad()
def border_effect(
    mosaic: Mosaic, batches: Iterable[Batch], others: Literal["same", "black"] = "same"
) -> BorderEffect:
    """Measure what an image's neighbours in the canvas change in its features.

    The reference sees the image in the same tile: same positions, same scale, no foreign content.

    Args:
        others: What fills the reference's other tiles: the image itself, or black.

    Raises:
        ValueError: no batch came.
    """
    ours, theirs = [], []
    count = mosaic.k**2
    for batch in batches:
        tiles = batch.at(mosaic.size, mosaic.teacher.interpolation)
        ours.append(mosaic(batch).spatial.float())
        places = torch.arange(len(tiles), device=tiles.device) % count
        image = torch.arange(len(tiles), device=tiles.device)
        filled = tiles.repeat_interleave(count, 0).unflatten(0, (len(tiles), count))
        if others == "black":
            filled = torch.zeros_like(filled)
            filled[image, places] = tiles
        # as many canvases at once as the mosaic had: compiled teachers have one size
        canvases = pack(filled.flatten(0, 1), mosaic.k).split(-(-len(tiles) // count))
        alone = torch.cat([mosaic.teacher(Batch(part)).spatial for part in canvases])
        each = cut(alone, mosaic.k).unflatten(0, (len(tiles), count))
        theirs.append(each[image, places].float())
    if not ours:
        raise ValueError("The border effect needs at least one batch of images.")
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    cosine = torch.cosine_similarity(ours, theirs, dim=-1).mean()
    return BorderEffect(
        agreement(theirs, ours), agreement(theirs[inner], ours[inner]), float(cosine)
    )


def agreement(theirs: Float[Tensor, "*B C"], ours: Float[Tensor, "*B C"]) -> float:
    """Return the fidelity tr Σ / (C · MSE) of `ours` to `theirs` (FeatSharp's measure)."""
    a, b = (x.flatten(0, -2).double() for x in (theirs, ours))
    return float((a - a.mean(0)).square().mean() / (a - b).square().mean())
