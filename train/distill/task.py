"""Distillation as a task of the training loop."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from zoo.data.plan import Plan
from zoo.features import Batch
from zoo.students.student import MESA
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import Distill
from zoo.train.distill.losses import SPATIAL_LOSSES, angle
from zoo.train.distill.plan_step import StepPlan, plan_step
from zoo.train.distill.step import distill_step
from zoo.train.distill.teachers import Model
from zoo.train.state import TrainState


def looks_of(
    plan: Plan, config: Distill, teachers: Mapping[str, Teacher], step: int
) -> Mapping[str, Model]:
    """Return the teachers that `step` asks, each as it looks then."""
    return plan_step(plan, step, config, teachers).teachers(teachers)


def objective_of(
    config: Distill, normalizers: Mapping[str, nn.Module], baseline_losses: Mapping[str, float]
) -> Callable[[Batch, TrainState, Mapping[str, Model], StepPlan], dict[str, Tensor]]:
    """Return the function that holds a trainee against its teachers, as the config says."""
    settings = config.losses
    summaries = {}
    if settings.summary == "angle":
        found = {key.removesuffix("/summary"): value for key, value in baseline_losses.items()}
        summaries = {
            label: partial(angle, dispersion=found[label])
            for label in config.labels
            if label in found
        }
    spaces = {**normalizers, MESA: nn.Identity()}

    def objective(
        batch: Batch, trainee: TrainState, teachers: Mapping[str, Model], turn: StepPlan
    ) -> dict[str, Tensor]:
        average = trainee.average if settings.mesa else None
        return distill_step(
            batch,
            turn.student(trainee.student, mesa=bool(settings.mesa)),
            {**teachers, **turn.average(average)},
            spaces,
            SPATIAL_LOSSES[settings.spatial],
            summary_losses=summaries,
            align=turn.align(),
            each_image=settings.teacher_drop > 0,
        )

    return objective
