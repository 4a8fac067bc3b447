"""Mosaic: many small images in one canvas of a teacher that takes a single resolution.

RADIOv2.5 (2412.07679) packs k x k images into the canvas of SAM, and C-RADIOv4 into SAM 3's, so
that the teacher runs once for k² images and its map is cut back into theirs. The cost of an image
falls k² times; how much an image's neighbours change its features is the border effect
(`border_effect`). The summary of a canvas belongs to none of its images, so a mosaic has none.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features
from zoo.teachers.teacher import Frozen


class Mosaic(nn.Module):
    """A teacher that sees `k` x `k` images at once, each in a tile of its canvas.

    Args:
        teacher: The teacher of the whole canvas, which has its `size`.
        k: Images along a side. Free tiles of the last canvas repeat the batch's first images.

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
        """Stay in eval mode: a teacher is never trained."""
        return super().train(False)

    def at_size(self, size: tuple[int, int]) -> "Mosaic":
        """Return this mosaic with tiles of another size, with the same weights in memory.

        Raises:
            ValueError: the teacher cannot take the canvas.
        """
        return Mosaic(self.teacher.at_size((self.k * size[0], self.k * size[1])), self.k)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Features:
        tiles = batch.at(self.size, self.teacher.interpolation)
        canvas = self.teacher(Batch(pack(tiles, self.k)))
        return Features(None, cut(canvas.spatial, self.k)[: len(tiles)])


def pack(tiles: Float[Tensor, "B 3 h w"], k: int) -> Float[Tensor, "n 3 H W"]:
    """Lay images out in canvases of k x k, row by row; the first images again fill the last one."""
    canvases = -(-len(tiles) // (k * k))
    chosen = torch.arange(canvases * k * k, device=tiles.device) % len(tiles)
    grid = tiles[chosen].unflatten(0, (canvases, k, k))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def cut(canvas: Float[Tensor, "n H W C"], k: int) -> Float[Tensor, "B h w C"]:
    """Undo `pack` on maps: one map a tile, the repeated images' included."""
    rows, cols = canvas.shape[1] // k, canvas.shape[2] // k
    tiles = canvas.unflatten(2, (k, cols)).unflatten(1, (k, rows))
    return tiles.transpose(2, 3).flatten(0, 2)


def check_tiles(teacher: Frozen, k: int) -> None:
    """Refuse a canvas that the teacher's stride, or a mosaic of `k` x `k` tiles, does not divide.

    Raises:
        ValueError: it does not; the nearest sizes that fit are named.
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
                f"{teacher.name} has {cells} cells on {side} px, so its stride is no whole number; "
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
    """How near an image's features in a mosaic are to those without foreign neighbours."""

    fidelity: float
    """tr Σ / (C · MSE) over all cells; infinite where neighbours change nothing."""
    inner: float
    """The same over the cells that touch no border of their tile."""
    cosine: float
    """Cosine similarity, the mean over all cells."""


@torch.no_grad()
def border_effect(
    mosaic: Mosaic, batches: Iterable[Batch], others: Literal["same", "black"] = "same"
) -> BorderEffect:
    """Measure how much an image's neighbours in the canvas change its features.

    The reference has the image in the same tile of the canvas, at the same positions and scale, but
    no other image beside it.

    Args:
        others: What fills the reference's other tiles: the image itself, or black.

    Raises:
        ValueError: there are no batches.
    """
    ours, theirs = [], []
    count = mosaic.k**2
    for batch in batches:
        tiles = batch.at(mosaic.size, mosaic.teacher.interpolation)
        ours.append(mosaic(batch).spatial.float())
        image = torch.arange(len(tiles), device=tiles.device)
        tile = image % count
        filled = tiles.repeat_interleave(count, 0).unflatten(0, (len(tiles), count))
        if others == "black":
            filled = torch.zeros_like(filled)
            filled[image, tile] = tiles
        # as many canvases at once as the mosaic had: compiled teachers take one batch size
        canvases = pack(filled.flatten(0, 1), mosaic.k).split(-(-len(tiles) // count))
        alone = torch.cat([mosaic.teacher(Batch(part)).spatial for part in canvases])
        each = cut(alone, mosaic.k).unflatten(0, (len(tiles), count))
        theirs.append(each[image, tile].float())
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
