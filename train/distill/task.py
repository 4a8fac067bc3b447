"""Distillation as a task of the training loop."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.plan import Plan
from zoo.features import Batch, Features
from zoo.students.student import MESA, Student, summary_key
from zoo.teachers.teacher import Teacher
from zoo.train.distill.calibrate import Calibration, Gains
from zoo.train.distill.config import Distill
from zoo.train.distill.losses import spatial_loss, summary_distance
from zoo.train.distill.plan_step import Align, Grids, StepPlan, drawn_teachers, plan_step
from zoo.train.distill.step import Term, distill_step, spatial_term, summary_term
from zoo.train.distill.weighting import Weighting
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class DistillTask(Task):
    """Many frozen teachers into one student.

    Args:
        teachers: By label; each answers at its own size.
        terms: What is compared, in the order of the student's heads.
        grids: Of the student (`zoo.train.distill.plan_step.grids_of`).
        gains: What calibration found for other sizes than the run's own.
    """

    def __init__(
        self,
        config: Distill,
        plan: Plan,
        teachers: Mapping[str, Teacher],
        terms: tuple[Term, ...],
        weighting: Weighting,
        grids: Grids,
        gains: Gains,
    ):
        self.config = config
        self.plan, self.teachers, self.grids, self.gains = plan, teachers, grids, gains
        self.terms, self.weighting = terms, weighting
        self.fast: Callable[..., dict[str, Features]] | None = None
        """What runs in the student's place in training, if anything does."""
        self.size = config.size
        """Of the student in the slice whose losses were asked for last."""

    @classmethod
    def of(
        cls,
        config: Distill,
        student: Student,
        plan: Plan,
        teachers: Mapping[str, Teacher],
        calibration: Calibration,
        grids: Grids,
    ) -> "DistillTask":
        """Put together what a config asks for."""
        normalizers, baseline_losses, gains = calibration
        terms = tuple(terms_of(config, student, normalizers, baseline_losses))
        specs = dict(zip(config.labels, config.teachers, strict=True))
        names, slices = [term.name for term in terms], config.num_slices
        weighting = Weighting(
            names, specs, config.losses, baseline_losses, num_slices=slices,
            device=student.mean.device,
        )  # fmt: skip
        weighting = weighting.to(student.mean.dtype)
        return cls(config, plan, teachers, terms, weighting, grids, gains)

    def planned(self, batch: Batch, step: int) -> StepPlan:
        positions = np.array(batch.positions) if batch.positions else self.plan.positions(step)
        return plan_step(
            self.plan, step, positions[: len(batch.images)], self.config, self.teachers, self.grids
        )

    def targets(self, batch: Batch, step: int) -> dict[str, Features]:
        """Ask the teachers of this step."""
        teachers = self.planned(batch, step).teachers(self.teachers)
        return {label: teacher(batch) for label, teacher in teachers.items()}

    def losses(
        self, state: TrainState, batch: Batch, targets: dict[str, Features], step: int
    ) -> dict[str, Loss]:
        """Compare the student with the teachers, and with its own average (MESA)."""
        planned, mesa = self.planned(batch, step), bool(self.config.losses.mesa)
        self.size = planned.size
        if mesa and state.ema:
            with torch.no_grad():
                targets = {**targets, MESA: planned.average(state.ema.module)(batch)}
        student = planned.student(state.model, mesa=mesa, fast=self.fast)
        return distill_step(batch, student, targets, self.terms, partial(self.align, planned))

    def align(self, planned: StepPlan, label: str) -> Align:
        """Return what brings two maps to one grid, and targets to the variance of the own size."""
        align, gain = planned.align(label), self.gains.get((label, planned.size))
        return align if gain is None else partial(_scaled, align, gain)

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        size = self.size if self.config.partition else None
        sampled = drawn_teachers(self.plan, step, self.config, size)
        return self.weighting(torch.stack(list(losses.values())), sampled)

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        self.weighting.observe(torch.stack(list(means.values())))


def _scaled(align: Align, gain: float, ours: Tensor, theirs: Tensor) -> tuple[Tensor, ...]:
    ours, theirs, *seen = align(ours, theirs)
    return gain * ours, gain * theirs, *seen


def terms_of(
    config: Distill,
    student: Student,
    normalizers: Mapping[str, nn.Module],
    baseline_losses: Mapping[str, float],
) -> Iterator[Term]:
    """Yield what the student's heads are compared with, as the config says."""
    losses = config.losses
    distance, each = spatial_loss(losses), losses.teacher_drop > 0
    for label, head in student.heads.items():
        if head.summary is not None:
            kind = config.summary_losses.get(label, losses.summary)
            scale = baseline_losses[f"{label}/summary"] if kind == "angle" else 1.0
            found = summary_distance(kind, dispersion=scale)
            yield summary_term(label, found, normalizers.get(summary_key(label)), each_image=each)
        if head.spatial is not None:
            yield spatial_term(label, distance, normalizers[label], each_image=each)
    if losses.mesa:
        yield spatial_term(MESA, distance, nn.Identity(), each_image=each)
