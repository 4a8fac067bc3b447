"""Teachers of a vision tower: anything that has a map, on the cells of the tower's tokens."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from zoo.features import Batch, at_grid
from zoo.teachers.teacher import Teacher


class MapTeacher(nn.Module):
    """A frozen teacher of features, beside those that write text too.

    Its images are those of the tower, resized to its own size; of images that are no squares it
    sees them squeezed, and its map is stretched back to their cells. Both maps are compared on the
    coarser grid, as in runs of vision (`zoo.features.match_grid`).

    Args:
        cell: Pixels of a token of the tower along each side.
        weight: What its distance counts, beside that of other teachers.

    Raises:
        ValueError: it has no map.
    """

    def __init__(self, teacher: Teacher, cell: int, weight: float = 1.0):
        super().__init__()
        if teacher.spatial_dim is None:
            raise ValueError(
                f"{teacher.name} has no map, and a tower's tokens are those of a map; take another "
                "teacher."
            )
        self.teacher, self.cell, self.weight = teacher, cell, weight

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        """Return its map of some images, no finer than their tokens."""
        spatial = self.teacher(Batch(images)).spatial
        assert spatial is not None  # `spatial_dim`
        grid = [
            min(side // self.cell, cells)
            for side, cells in zip(images.shape[-2:], spatial.shape[1:3], strict=True)
        ]
        return at_grid(spatial, (grid[0], grid[1]))
