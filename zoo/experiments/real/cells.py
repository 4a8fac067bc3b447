"""The cells of the experiment, in the order of their importance, and the run that each is."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch

from zoo.experiments.real.config import RealExperiment
from zoo.train.config import Every, Optim
from zoo.train.distill.config import Distill, TeacherSpec

SEVERAL = "phi_s, several sizes"
"""The arm that learns at all sizes, one drawn for each step."""
NOT_TRAINED = ("teachers", "untrained")


@dataclass(frozen=True)
class Cell:
    """A student of one arm and seed.

    Arms are named after the scale on which they match the teachers' maps, but for `SEVERAL`,
    `labels` and `NOT_TRAINED`.
    """

    student: str
    arm: str
    seed: int = 0

    @property
    def key(self) -> str:
        """Name it among all cells; a folder may be called so."""
        return f"{self.student}-{self.arm}-{self.seed}".replace(", ", "_").replace(" ", "_")


def cells(config: RealExperiment) -> Iterator[Cell]:
    """Yield the cells, the most important first.

    The teachers; the first student with its controls; then two further seeds of it, where the other
    seeds begin (nothing is trained for those), the other students with the control, the other arms,
    the sizes, and the rest of the seeds.
    """
    first, *others = config.students
    early = min(3, config.seeds)
    yield Cell("teachers", "teachers")
    yield Cell(first, "untrained")
    for seed in range(early):
        yield from (Cell(first, arm, seed) for arm in ("phi_s", "labels", "none"))
    yield from (Cell(first, "untrained", seed) for seed in range(1, config.seeds))
    for student in others:
        yield from (Cell(student, arm) for arm in ("untrained", "phi_s", "labels"))
    if len(config.sizes) > 1:
        yield Cell(config.resolved, SEVERAL)
    yield from (Cell(first, arm) for arm in config.arms)
    for seed in range(early, config.seeds):
        yield from (Cell(first, arm, seed) for arm in ("phi_s", "labels", "none"))
    yield from (Cell(student, "none") for student in others)


def distillation(config: RealExperiment, cell: Cell, dense: str | None) -> Distill:
    """Return the run of a cell that learns from the teachers: what `zoo distill` is given.

    Args:
        dense: The teacher that was trained on the spot, by name; `None` for none.
    """
    several = cell.arm == SEVERAL
    sizes = config.sizes if several else ()
    names = (*config.teachers, dense) if dense else config.teachers
    return Distill(
        data=config.data,
        teachers=tuple(map(TeacherSpec.parse, names)),
        student=cell.student,
        student_options=options_of(cell.student) if cell.student == config.resolved else (),
        sizes=sizes,
        batches=tuple(map(config.batch_at, sizes)),
        normalise="phi_s" if several else cell.arm,  # pyright: ignore[reportArgumentType]
        calibration=config.calibration,
        eval_images=16 if config.tiny else 512,
        probe_images=16,  # photographs with classes are probed by the run; nobody reads that here
        speed=config.speed,
        **shared(config, cell),
    )


def shared(config: RealExperiment, cell: Cell) -> dict[str, Any]:
    """Return what all trainings of a student have in common, with and without teachers."""
    steps = config.steps_of(cell.student)
    return dict(
        steps=steps,
        size=config.size,
        batch=config.batch,
        seed=cell.seed,
        device=config.device,
        precision=config.precision,
        workers=config.workers,
        optim=Optim(lr=config.rate),
        every=Every(log=max(1, min(50, steps // 3)), checkpoint=500, evaluate=10**9),
        out=config.place / cell.key,
    )


@cache
def options_of(student: str) -> tuple[str, ...]:
    """Return the option by which a ViT takes images of any size, if it needs one.

    It has the option in every arm, so that arms differ in what they learn alone.
    """
    with torch.device("meta"):
        backbone = timm.create_model(student, num_classes=0)
    fixed = getattr(backbone, "dynamic_img_size", None) is False
    return ("dynamic_img_size=True",) if fixed else ()
