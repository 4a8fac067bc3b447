"""One student's training through the library's loop, and its perplexity on the way."""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.data.plan import Plan
from zoo.data.text import TextFeed, TextSource
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.config import Every, Optim
from zoo.train.device import autocast
from zoo.train.distill.token_config import DistillText, TokenLosses
from zoo.train.distill.token_task import TokenTask, evaluate_text
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState


class Unwritten(Run):
    """A run of which nothing stays on the disk: a student's checkpoint is 3 GB, a cell 20 s."""

    def log(self, *_: Any, **__: Any) -> None:
        """Leave losses out; the curve is measured apart."""

    def log_speed(self, *_: Any, **__: Any) -> None:
        """Leave it out; the cell is timed as a whole."""

    def save(self, *_: Any, **__: Any) -> None:
        """Save nothing."""


class Settings(NamedTuple):
    """What all cells share."""

    steps: int
    batch: int
    length: int
    device: torch.device


def perplexity(model: Any, source: TextSource, settings: Settings, rows: int = 10**9) -> float:
    """Measure a model on a text."""
    return measured(model, {}, source, settings, rows)["perplexity"]


def measured(
    model: Any,
    teachers: dict[str, LanguageTeacher],
    source: TextSource,
    settings: Settings,
    rows: int = 10**9,
) -> dict[str, float]:
    """Measure a model's perplexity, and its divergence from each teacher (`kl/NAME`)."""
    options: Any = dict(rows=rows, batch=settings.batch)
    with autocast("auto", settings.device):
        return dict(evaluate_text(model, teachers, source, settings.device, **options))


def marks(steps: int) -> list[int]:
    """Return steps, about equally far apart in their logarithms, at which a curve is measured."""
    return sorted({round(steps * 2.0**-i) for i in range(7)} - {0})


def learn(
    student: Any,
    teacher: LanguageTeacher | None,
    text: TextSource,
    held: TextSource,
    settings: Settings,
    *,
    lr: float,
    seed: int,
    at: Iterable[int],
) -> tuple[dict[int, float], float]:
    """Train a student on a text, from a teacher or from the text alone.

    Returns:
        The perplexity on the held-out text after the steps `at` and the last, and the seconds of
        the training without those measurements.
    """
    config = DistillText(
        steps=settings.steps, batch=settings.batch, length=settings.length, seed=seed,
        device="cuda" if settings.device.type == "cuda" else "cpu",
        optim=Optim(lr=lr, min_lr=lr / 100, weight_decay=0.1, betas=(0.9, 0.95), ema=0.0),
        every=Every(log=max(1, settings.steps // 4), checkpoint=settings.steps, evaluate=1),
        losses=TokenLosses(kl=1.0 if teacher else 0.0, ce=0.0 if teacher else 1.0),
    )  # fmt: skip
    at, curve, measuring = {*at, settings.steps}, dict[int, float](), 0.0

    def look(model: Any, step: int) -> None:
        nonlocal measuring
        if step in at:
            synchronise(settings.device)
            began = time.perf_counter()
            curve[step] = perplexity(model, held, settings)
            measuring += time.perf_counter() - began

    look(student, 0)
    state = TrainState.of(student.train(), config.optim)
    feed = TextFeed(text, Plan(len(text), config.batch, seed), settings.device)
    task = TokenTask(config.losses, {"parent": teacher} if teacher else {})
    with tempfile.TemporaryDirectory() as folder:
        measuring, began = 0.0, time.perf_counter()
        train(task, state, feed, config, Unwritten(Path(folder)), evaluate=look, title="learn")
        synchronise(settings.device)
        seconds = time.perf_counter() - began - measuring
    student.eval()
    look(student, settings.steps)
    return curve, seconds


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
