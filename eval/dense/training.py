"""Train a head on a model's features, by the loop of all trainings here."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.data.crops import CropFeed, CropSpec, DenseSource
from zoo.data.plan import Plan
from zoo.eval.registry import Subject
from zoo.eval.work import work_folder
from zoo.train.config import Every, Optim, Training
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.task import Task


@dataclass(frozen=True, kw_only=True)
class HeadTraining(Training):
    """The training of a head."""

    kind: ClassVar[str] = "head"

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the benchmark for which the head is trained."""

    @classmethod
    def of(cls, settings: Any, seed: int, out: Path) -> "HeadTraining":
        """Return the loop's config for a benchmark's settings; the rate falls linearly to 0."""
        steps, tenth = settings.steps, -(-settings.steps // 10)
        warmup = max(1, min(settings.warmup, steps // 10))
        return cls(
            out=out,
            seed=seed,
            steps=steps,
            batch=settings.batch,
            workers=settings.workers,
            precision="float32",  # for the head; features are computed in the subject's precision
            optim=Optim(
                lr=settings.lr,
                min_lr=0.0,
                weight_decay=settings.weight_decay,
                warmup=warmup / steps,
                schedule="linear",
                clip=0.0,
                ema=0.0,
            ),
            every=Every(log=min(50, tenth), checkpoint=min(500, tenth)),
            settings=asdict(settings),
        )


def train_head(
    model: nn.Module,
    task: Task,
    source: DenseSource,
    crop: CropSpec,
    subject: Subject,
    settings: Any,
    groups: Iterable[dict[str, Any]],
) -> None:
    """Train on crops of `source`; resume a training that was stopped in `subject.work`.

    Args:
        settings: The benchmark's settings: steps, batch, lr, weight_decay, warmup, workers.
        groups: The parameters to train; the `scale` of a group multiplies its rate.

    Raises:
        ValueError: a loss is not finite.
        Interrupted: a signal came.
    """
    with work_folder(subject.work) as out:
        config = HeadTraining.of(settings, subject.seed, out)
        run = Run.begin(config)
        decay = config.optim.weight_decay
        groups = [dict(group, weight_decay=decay) for group in groups]
        state = TrainState.of(model, config.optim, groups=groups)
        state.resume(run)
        plan = Plan(len(source), config.batch, config.seed)
        feed = CropFeed(source, crop, plan, subject.device, settings.workers)
        model.train()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            train(task, state, feed, config, run, title=f"{subject.name} head")
        subject.unreadable.update(run.skipped())
        model.eval()
