"""Teachers that change their size with the student's (stochastic resolution, C-RADIOv4 1.3)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from zoo.features import Batch, Features
from zoo.teachers.teacher import Teacher


class MultiSizeTeacher(nn.Module):
    """One teacher at several sizes: at each size of the student, on the student's grid.

    The sizes are networks of their own, opened with all the checks of a teacher, so shapes stay
    static; what they share (all but tables of positions) is held once. By itself it looks at the
    size that goes with `nominal`.

    Args:
        looks: The teacher for each side of the student's images.
        nominal: The student's side in evaluations.
    """

    def __init__(self, looks: Mapping[int, nn.Module], nominal: int):
        super().__init__()
        self.nominal = str(nominal)
        self.looks = nn.ModuleDict({str(size): teacher for size, teacher in looks.items()})
        for teacher in looks.values():
            _share(teacher, looks[nominal])

    def at(self, size: int) -> Any:
        """Return the teacher as it looks beside a student at `size`."""
        return self.looks[str(size)]

    def __getattr__(self, name: str):
        if name in ("name", "size", "summary_dim", "spatial_dim", "grid", "license"):
            return getattr(self.looks[self.nominal], name)
        return super().__getattr__(name)

    def forward(self, batch: Batch) -> Features:
        return self.looks[self.nominal](batch)


def at_size(teacher: Teacher, size: int) -> Teacher:
    """Return the teacher as it looks beside a student at `size`: itself, if it does not follow."""
    return teacher.at(size) if isinstance(teacher, MultiSizeTeacher) else teacher


def sizes_of(teacher: Teacher) -> list[tuple[int, int]]:
    """List all sizes that a teacher looks at."""
    if isinstance(teacher, MultiSizeTeacher):
        return [teacher.at(int(size)).size for size in teacher.looks]
    return [teacher.size]


def follow(
    text: str,
    opened: Callable[[str], Teacher],
    grids: Mapping[int, tuple[int, int]],
    nominal: int,
) -> MultiSizeTeacher:
    """Open the teacher `text` for each of the student's sizes: as many cells, of its own patch.

    Args:
        opened: Opens a teacher by name.
        grids: The student's grid at each side of its images.

    Raises:
        ValueError: the teacher has no map, or cannot look at one of the sizes.
    """
    first = opened(text)
    if not first.grid or not isinstance(first, nn.Module):
        raise ValueError(
            f"{text} has no map whose grid could follow the student's; leave out follow."
        )
    patch = first.size[0] // first.grid[0]
    bare = re.sub(r"@\d+$", "", text)
    looks: dict[int, nn.Module] = {}
    for size, grid in grids.items():
        side = grid[0] * patch
        found = first if (side, side) == first.size else opened(f"{bare}@{side}")
        if found.grid != grid:
            raise ValueError(
                f"{bare}@{side} has a grid of {found.grid}, and the student {grid} at {size} px; "
                "it cannot follow."
            )
        assert isinstance(found, nn.Module)
        looks[size] = found
    return MultiSizeTeacher(looks, nominal)


def _share(teacher: nn.Module, other: nn.Module) -> None:
    """Let `teacher` hold the parameters of `other` where they are the same."""
    theirs = dict(other.named_parameters())
    for path, module in teacher.named_modules():
        for name, mine in list(module.named_parameters(recurse=False)):
            same = theirs.get(f"{path}.{name}" if path else name)
            if same is not None and mine.shape == same.shape and mine.equal(same):
                module.register_parameter(name, same)
