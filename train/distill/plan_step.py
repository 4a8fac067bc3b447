"""What is decided about one step: the student's size, which teachers, which crops.

All of it follows from (seed, step) and positions in the stream, on the host, so a resumed run
decides the same and no step waits for the device.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import accumulate

import numpy as np
from torch import Tensor

from zoo.data.plan import Plan, mix
from zoo.data.views import View
from zoo.features import Batch, Features, match_grid
from zoo.students.build import student_grids
from zoo.students.student import MESA, Student
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import Distill
from zoo.train.distill.shift import Window, cropped, draw_windows, overlap, shifted
from zoo.train.distill.sizes import at_size, every_size

Model = Callable[[Batch], Features]
Align = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Grids = Mapping[int, tuple[int, int]]
"""Rows and columns of the student's map, by the side of its images."""

SAMPLED, SHIFT, ATTENTION = 5, 6, 7
"""Salts of `mix`; the plan's own are 1, 2 and 4, that of the calibration's plan is 3."""


@dataclass(frozen=True)
class StepPlan:
    """What was decided about one slice of one step."""

    size: int
    """Side of the student's images."""
    sampled: frozenset[str] | None
    """Labels of the teachers of this step; `None` if every step has all of them."""
    windows: Mapping[str, Window] = field(default_factory=dict)
    """What each teacher sees of the canvases, by label, and `STUDENT` the student; nothing without
    shifts."""
    attention: int = 0
    """Side, in patches, of the windows of the student's attention; 0 for none."""

    def student(
        self,
        student: Student,
        *,
        mesa: bool,
        fast: Callable[..., dict[str, Features]] | None = None,
    ) -> Callable[[Batch], dict[str, Features]]:
        """Return the student as this step runs it.

        Args:
            fast: Called in the student's place.
        """
        model = partial(fast or student, size=(self.size, self.size), mesa=mesa)
        if self.attention:
            model = student.in_windows(self.attention)(model)
        window = self.windows.get(STUDENT)
        return model if window is None else lambda batch: model(cropped(batch, window))

    def teachers(self, teachers: Mapping[str, Teacher]) -> dict[str, Model]:
        """Return those that are sampled, each as this step runs it."""
        return self._shifted(
            {
                label: at_size(teacher, self.size)
                for label, teacher in teachers.items()
                if self.sampled is None or label in self.sampled
            }
        )

    def average(self, average: Student) -> Model:
        """Return the student's own average, the teacher of MESA, as this step runs it."""
        return self._shifted({MESA: partial(average.own_map, size=(self.size, self.size))})[MESA]

    def _shifted(self, found: dict[str, Model]) -> dict[str, Model]:
        for label in set(found) & set(self.windows):
            found[label] = shifted(found[label], self.windows[label])
        return found

    def align(self, label: str) -> Align:
        """Return what brings the student's map and that of a teacher to one grid and one window."""
        ours, theirs = self.windows.get(STUDENT), self.windows.get(label)
        if ours is None or theirs is None:
            return match_grid
        return partial(overlap, our_window=ours, their_window=theirs)


STUDENT = "student.itself"
"""No teacher's label has a dot."""


def drawn_size(plan: Plan, step: int, config: Distill) -> int:
    """Draw the side of the student's images in `step`."""
    sizes = config.sizes
    return sizes[plan.kind(step, len(sizes))] if sizes else config.size


def slice_size(plan: Plan, step: int, position: int, config: Distill) -> int:
    """Return the side of the student's images in the slice whose first one is at `position`.

    A step has one size, or with a partition one for each group of its slices.
    """
    groups = config.groups
    if not groups:
        return drawn_size(plan, step, config)
    ends = list(accumulate(group.images for group in groups))
    return groups[bisect_right(ends, position % plan.batch)].size


def shared_counts(config: Distill) -> dict[str, int]:
    """Count the images of a batch that a teacher of a partition sees, by the names of its losses.

    So a loss is the mean over those: of W slices of equal size R have the teacher, and each of them
    counts W / R times as much as if all had it (TAO; AM-RADIO, 2312.06709, 3.4).
    """
    seen = {
        label: sum(group.images for group in config.groups if spec.at in (0, group.size))
        for label, spec in zip(config.labels, config.teachers, strict=True)
    }
    parts = ("summary", "spatial")
    return {f"{label}/{part}": n for label, n in seen.items() for part in parts if config.partition}


def drawn_window(plan: Plan, step: int, config: Distill, grid: tuple[int, int]) -> int:
    """Draw the windows of the student's attention in `step`, among those that tile its grid.

    All slices of one size, and so their ranks, have the same: they take equally long.
    """
    fit = [w for w in config.attention_windows if not w or not (grid[0] % w or grid[1] % w)]
    return fit[mix(plan.seed, ATTENTION, step) % len(fit)] if fit else 0


def drawn_teachers(
    plan: Plan, step: int, config: Distill, size: int | None = None
) -> frozenset[str] | None:
    """Draw the teachers of `step`: those of its size, each with the chance of its rate.

    Args:
        size: Of the slice, if slices have different ones.
    """
    if all(spec.rate == 1 and not spec.at for spec in config.teachers):
        return None
    size = size or drawn_size(plan, step, config)
    return frozenset(
        label
        for i, (label, spec) in enumerate(zip(config.labels, config.teachers, strict=True))
        if spec.at in (0, size) and mix(plan.seed, SAMPLED, step, i) / 2**63 < spec.rate
    )


def plan_step(
    plan: Plan,
    step: int,
    positions: np.ndarray,
    config: Distill,
    teachers: Mapping[str, Teacher],
    grids: Grids,
) -> StepPlan:
    """Decide everything about a slice of `step`.

    Args:
        grids: What `grids_of` returns.
        positions: In the stream of the slice's images. Windows follow from them alone, so that
            views that come again are seen through the same ones, however a batch is sliced.
    """
    size = slice_size(plan, step, int(positions[0]), config)
    sampled, attention = drawn_teachers(plan, step, config, size), 0
    if config.attention_windows:
        attention = drawn_window(plan, step, config, grids[size])
    if not config.losses.shift:
        return StepPlan(size, sampled, attention=attention)
    grid = grids[size]
    room = Fraction(config.losses.shift, grid[0])
    shown: dict[str, tuple[tuple[int, int], tuple[int, int] | None]]
    shown = {STUDENT: ((size, size), grid)}
    for label, teacher in teachers.items():
        sized = at_size(teacher, size)
        shown[label] = (sized.size, sized.grid)
    if config.losses.mesa:
        shown[MESA] = shown[STUDENT]
    windows = {
        who: draw_windows(pixels, cells, room, plan.seed, SHIFT, plan.stored(positions), i)
        for i, (who, (pixels, cells)) in enumerate(shown.items())
    }
    return StepPlan(size, sampled, windows, attention)


def grids_of(config: Distill) -> Grids:
    """Return the student's grid at its own size and at each that is drawn.

    Raises:
        ValueError: the student cannot take one of them.
    """
    sizes = tuple(dict.fromkeys((config.size, *config.sizes)))
    return student_grids(config.student, config.size, sizes, config.student_options)


def check_step_plans(config: Distill, teachers: Mapping[str, Teacher], grids: Grids) -> None:
    """Refuse shifts and windows that student or teachers cannot take, before any work.

    Raises:
        ValueError: a shift needs cells of whole pixels, and half of a map in common; a window must
            tile one of the student's grids.
    """
    for window in filter(None, config.attention_windows):
        if all(rows % window or cols % window for rows, cols in grids.values()):
            shown = ", ".join(f"{rows}x{cols}" for rows, cols in grids.values())
            raise ValueError(
                f"attention_windows: {window} tiles none of the student's grids ({shown} patches); "
                "take a divisor of their sides."
            )
    shift = config.losses.shift
    if not shift:
        return
    shown = [(config.student, (size, size), grid) for size, grid in grids.items()]
    for label, teacher in teachers.items():
        sized = [at_size(teacher, size) for size in grids]
        shown += [(label, t.size, t.grid) for t in sized if t.grid]
    for name, size, grid in shown:
        if any(pixels % cells for pixels, cells in zip(size, grid, strict=True)):
            raise ValueError(
                f"losses.shift moves crops by whole cells, and the {grid[0]}x{grid[1]} cells of "
                f"{name} at {size[0]}x{size[1]} px are none; choose a size that they tile, or "
                "--losses.shift 0."
            )
    least = min(grid[0] for grid in grids.values())
    if 2 * shift > least:
        raise ValueError(
            f"losses.shift {shift} would leave less than half of a map of {least} cells in common; "
            f"at most {least // 2} is allowed here."
        )


def view_of(config: Distill, teachers: Mapping[str, Teacher], grids: Grids) -> View:
    """Return the crop that is decoded once, for the largest input; others resize it there."""
    theirs = [max(sized.size) for teacher in teachers.values() for sized in every_size(teacher)]
    sizes = [config.size, *config.sizes, *theirs]
    if config.losses.shift:  # the canvas is larger than what each sees of it
        least = min(grid[0] for grid in grids.values())
        sizes = [size + math.ceil(size * Fraction(config.losses.shift, least)) for size in sizes]
    return View(
        size=max(sizes),
        scale=config.augment.scale,
        ratio=config.augment.ratio,
        flip=config.augment.flip,
        decoder="torch" if config.decoder == "torch" else "pillow",
    )
