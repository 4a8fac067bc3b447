"""Teachers of a vision tower: a map, on the cells of the tower's tokens, and a summary."""

from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from zoo.features import Batch, Features, at_grid
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import TeacherSpec
from zoo.train.distill.losses import dispersion, refuse_no_probabilities, summary_distance


class MapTeacher(nn.Module):
    """A frozen teacher of features, beside those that write text too.

    Its images are those of the tower, resized to its own size; of images that are no squares it
    sees them squeezed, and its map is stretched back to their cells. Both maps are compared on the
    coarser grid, as in runs of vision (`zoo.features.match_grid`).

    Args:
        spec: What its map and its summary count, beside those of other teachers, and the summary's
            loss; `run` is the cosine.
        cell: Pixels of a token of the tower along each side.

    Raises:
        ValueError: it has no map, or no summary, and is to teach one.
    """

    def __init__(self, teacher: Teacher, spec: TeacherSpec, cell: int):
        super().__init__()
        if spec.spatial and teacher.spatial_dim is None:
            raise ValueError(
                f"{teacher.name} has no map, and a tower's tokens are those of a map; take another "
                "teacher, or its summary alone: ,spatial=0,summary=1 behind its name."
            )
        if spec.summary and teacher.summary_dim is None:
            raise ValueError(f"{teacher.name} has no summary; leave out summary=.")
        self.teacher, self.spec, self.cell = teacher, spec, cell
        self.summary_loss: Callable[..., Tensor] | None = None
        """Of two rows of summaries; there once `measure` has seen some."""

    @property
    def weights(self) -> dict[str, float]:
        """What each of its losses counts, by the end of the loss's name."""
        return dict(vision=float(self.spec.spatial), summary=float(self.spec.summary))

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Features:
        """Return what it teaches of some images: its map no finer than their tokens, its summary.

        What counts nothing is `None`.
        """
        found = self.teacher(Batch(images))
        summary = found.summary if self.spec.summary else None
        if not self.spec.spatial:
            return Features(summary, None)
        spatial = found.spatial
        assert spatial is not None  # `spatial_dim`
        grid = [
            min(side // self.cell, cells)
            for side, cells in zip(images.shape[-2:], spatial.shape[1:3], strict=True)
        ]
        return Features(summary, at_grid(spatial, (grid[0], grid[1])))

    def measure(self, summaries: Tensor) -> None:
        """Set its summary's loss by some summaries of its own, [n C].

        Raises:
            ValueError: the loss is for probabilities, and these are none.
        """
        kind = "cosine" if self.spec.loss == "run" else self.spec.loss
        refuse_no_probabilities(kind, summaries, self.teacher.name)
        scale = float(dispersion(summaries)) if kind == "angle" else 1.0
        self.summary_loss = summary_distance(kind, dispersion=scale)
