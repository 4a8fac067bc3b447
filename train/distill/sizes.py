"""Teachers that change their size with the student's (stochastic resolution, C-RADIOv4 1.3)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from zoo.features import Batch, Features
from zoo.teachers.teacher import Teacher


class MultiSizeTeacher(nn.Module):
    """One teacher at several sizes: at each size of the student, on the student's grid.

    Each size is a network of its own, opened with all the checks of a teacher, so shapes stay
    static. What the networks share (everything but tables of positions) is in memory once. Called
    itself, it is the teacher for the size `nominal`.

    Args:
        by_size: The teacher for each side of the student's images, in pixels.
        nominal: The student's side in evaluations; a key of `by_size`.
    """

    def __init__(self, by_size: Mapping[int, nn.Module], nominal: int):
        super().__init__()
        self.nominal = str(nominal)
        # the attribute's name is part of the fingerprint by which a resumed run knows its teachers
        self.looks = nn.ModuleDict({str(size): teacher for size, teacher in by_size.items()})
        for teacher in by_size.values():
            _share(teacher, by_size[nominal])

    def at(self, size: int) -> Any:
        """Return the teacher for a student at `size` pixels.

        Raises:
            KeyError: it was not opened for that size.
        """
        return self.looks[str(size)]

    def __getattr__(self, name: str):
        if name in ("name", "size", "summary_dim", "spatial_dim", "grid", "license"):
            return getattr(self.looks[self.nominal], name)
        return super().__getattr__(name)

    def forward(self, batch: Batch) -> Features:
        return self.looks[self.nominal](batch)


def at_size(teacher: Teacher, size: int) -> Teacher:
    """Return the teacher for a student at `size` pixels: itself, if it has one size."""
    return teacher.at(size) if isinstance(teacher, MultiSizeTeacher) else teacher


def sizes_of(teacher: Teacher) -> list[tuple[int, int]]:
    """List all image sizes (rows, columns) of a teacher."""
    if isinstance(teacher, MultiSizeTeacher):
        return [teacher.at(int(size)).size for size in teacher.looks]
    return [teacher.size]


def match_student_size(
    text: str,
    open_one: Callable[[str], Teacher],
    grids: Mapping[int, tuple[int, int]],
    nominal: int,
) -> MultiSizeTeacher:
    """Open the teacher `text` for each of the student's sizes, with the student's grid (follow=1).

    The teacher keeps its patch, so its images have patch times as many pixels as the grid cells.

    Args:
        open_one: Opens a teacher by name.
        grids: The student's grid at each side of its images, in pixels.
        nominal: The student's side in evaluations; a key of `grids`.

    Raises:
        ValueError: the teacher has no map, or cannot take images of one of the sizes.
    """
    first = open_one(text)
    if not first.grid or not isinstance(first, nn.Module):
        raise ValueError(
            f"{text} has no map whose grid could follow the student's; leave out follow."
        )
    patch = first.size[0] // first.grid[0]
    bare = re.sub(r"@\d+$", "", text)
    by_size: dict[int, nn.Module] = {}
    for size, grid in grids.items():
        side = grid[0] * patch
        teacher = first if (side, side) == first.size else open_one(f"{bare}@{side}")
        if teacher.grid != grid:
            raise ValueError(
                f"{bare}@{side} has a grid of {teacher.grid}, and the student {grid} at {size} px. "
                "The teacher cannot follow; leave out follow."
            )
        assert isinstance(teacher, nn.Module)
        by_size[size] = teacher
    return MultiSizeTeacher(by_size, nominal)


def _share(teacher: nn.Module, other: nn.Module) -> None:
    """Replace the parameters of `teacher` by those of `other` where they are equal."""
    theirs = dict(other.named_parameters())
    for path, module in teacher.named_modules():
        for name, mine in list(module.named_parameters(recurse=False)):
            same = theirs.get(f"{path}.{name}" if path else name)
            if same is not None and mine.shape == same.shape and mine.equal(same):
                module.register_parameter(name, same)
