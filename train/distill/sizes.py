"""Teachers that change their size with the student's (stochastic resolution, C-RADIOv4 1.3)."""

import re
from collections.abc import Callable, Mapping

from torch import nn

from zoo.features import Batch, Features
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.teacher import Frozen, Teacher, reason


class MultiSizeTeacher(nn.Module):
    """One teacher at several sizes: at each size of the student, on the student's grid.

    All sizes share one network's weights. Called itself, it is the teacher for the size `nominal`.

    Args:
        by_size: The teacher for each side of the student's images, in pixels.
        nominal: The student's side in evaluations; a key of `by_size`.
    """

    summary_dim: int | None
    spatial_dim: int | None
    grid: tuple[int, int] | None
    license: str | None

    def __init__(self, by_size: Mapping[int, Frozen | Mosaic], nominal: int):
        super().__init__()
        self.by_size, own = dict(by_size), by_size[nominal]
        self.nominal, self.sized = own, nn.ModuleList(by_size.values())
        self.name, self.size, self.grid, self.license = own.name, own.size, own.grid, own.license
        self.summary_dim, self.spatial_dim = own.summary_dim, own.spatial_dim

    def forward(self, batch: Batch) -> Features:
        return self.nominal(batch)


def at_size(teacher: Teacher, size: int) -> Teacher:
    """Return the teacher for a student at `size` pixels: itself, if it has one size.

    Raises:
        KeyError: it was not opened for that size.
    """
    return teacher.by_size[size] if isinstance(teacher, MultiSizeTeacher) else teacher


def every_size(teacher: Teacher) -> list[Teacher]:
    """Return the teacher for each size of the student, that of its evaluations first."""
    if not isinstance(teacher, MultiSizeTeacher):
        return [teacher]
    own = teacher.nominal
    return [own, *(other for other in teacher.by_size.values() if other is not own)]


def frozen(teacher: Teacher) -> list[Frozen]:
    """Return the networks behind a teacher, one a size, that of evaluations first.

    Their weights are shared. A cache, or a rule of somebody's own, has none.
    """
    inner = (t.teacher if isinstance(t, Mosaic) else t for t in every_size(teacher))
    return [network for network in inner if isinstance(network, Frozen)]


def match_student_size(
    text: str,
    open_one: Callable[[str], Teacher],
    grids: Mapping[int, tuple[int, int]],
    nominal: int,
) -> MultiSizeTeacher:
    """Open the teacher `text` for each of the student's sizes, with the student's grid (follow=1).

    The teacher keeps its patch, so its images have patch times as many pixels as the grid cells.
    One network is built, at its library's own size; a resolution in `text` is not looked at, but
    for a module of somebody's own (`torch:`), which has no other.

    Args:
        open_one: Opens a teacher by name.
        grids: The student's grid at each side of its images, in pixels.
        nominal: The student's side in evaluations; a key of `grids`.

    Raises:
        ValueError: the teacher has no map, or cannot take images of one of the sizes.
    """
    bare = text if text.startswith("torch:") else re.sub(r"@\d+$", "", text)
    first = open_one(bare)
    if not isinstance(first, Frozen | Mosaic) or not first.grid:
        raise ValueError(
            f"{bare} has no map whose grid could follow the student's; leave out follow."
        )
    patch = first.size[0] // first.grid[0]
    by_size: dict[int, Frozen | Mosaic] = {}
    for size, grid in grids.items():
        side = (grid[0] * patch, grid[1] * patch)
        try:
            by_size[size] = first if side == first.size else first.at_size(side)
        except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"{bare} cannot follow a student at {size} px to {side[0]}x{side[1]} px: "
                f"{reason(error)}. Leave out follow."
            ) from error
        if by_size[size].grid != grid:
            raise ValueError(
                f"{bare} at {side[0]}x{side[1]} px has a grid of {by_size[size].grid}, and the "
                f"student {grid} at {size} px. The teacher cannot follow; leave out follow."
            )
    return MultiSizeTeacher(by_size, nominal)
