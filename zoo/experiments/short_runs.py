"""Trainings of seconds to minutes on bytes, by the loop, without checkpoints."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from zoo.train.config import Every, Optim, Training
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.task import Feed, Task


@dataclass(frozen=True, kw_only=True)
class ShortTraining(Training):
    """The config of one such training."""

    kind: ClassVar[str] = "experiment"
    unit: ClassVar[str] = "B"
    length: int = 1
    """Bytes in a row."""

    @property
    def samples(self) -> int:
        """Bytes a step."""
        return self.batch * self.length


class CellRun(Run):
    """A run without TensorBoard."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._trackers = []


class ShortRun(CellRun):
    """A run without checkpoints and TensorBoard."""

    def save(self, state: dict[str, Any], *, wait: bool = True, kept: int = 2) -> None:
        del state, wait, kept


def short_training(
    *,
    steps: int,
    batch: int,
    length: int,
    rate: float,
    seed: int,
    precision: Literal["auto", "float32", "bf16"],
) -> ShortTraining:
    """Return the config of a training whose rate falls to a twentieth."""
    optim = Optim(lr=rate, min_lr=rate / 20, betas=(0.9, 0.95), weight_decay=0.1, ema=0.0)
    every = Every(log=max(1, steps // 4), checkpoint=steps, evaluate=1)
    return ShortTraining(
        steps=steps, batch=batch, length=length, seed=seed, precision=precision, optim=optim,
        every=every,
    )  # fmt: skip


def train_short(
    model: Any,
    task: Task,
    feed: Feed,
    config: ShortTraining,
    *,
    evaluate: Callable[[Any, int], None],
    title: str,
) -> None:
    """Train a model in place; `evaluate` sees it after every step but the last."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, out=Path(folder) / "run")
        run = ShortRun.create(config)
        state = TrainState.of(model.train(), config.optim)
        train(task, state, feed, config, run, evaluate=evaluate, title=title)
