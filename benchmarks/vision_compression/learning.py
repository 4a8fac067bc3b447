"""One child's training through the library's loop and task, on views that are decoded once."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from zoo.data.feed import ImageFeed, PlanFeed
from zoo.data.loader import eval_batches
from zoo.data.plan import Plan
from zoo.data.sources import Source, spread
from zoo.eval.extract import extract
from zoo.eval.fidelity import fidelity
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe
from zoo.features import Batch
from zoo.students.build import build_heads
from zoo.students.heads import head_hidden
from zoo.students.student import Student
from zoo.train.config import Every, Optim
from zoo.train.device import in_precision
from zoo.train.distill.calibrate import Calibration, fit_normalizers
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.fold import folded
from zoo.train.distill.setup import Setup, prepare
from zoo.train.distill.task import DistillTask
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState


class Recorded(PlanFeed):
    """The batches of a feed, kept on the device: each cell of the comparison sees the same."""

    def __init__(self, feed: ImageFeed, steps: int):
        self.source, self.plan, self.slices = feed.source, feed.plan, feed.slices
        self.kept = list(feed.batches(0, steps))

    def batches(self, start: int, steps: int) -> Iterator[Batch]:
        """Return them anew, without the sizes that were made of them."""
        for batch in self.kept[start:steps]:
            yield Batch(batch.images, batch.keys, batch.labels, batch.positions)


class Unwritten(Run):
    """A run of which nothing stays on the disk."""

    def log(self, *_: Any, **__: Any) -> None:
        """Leave losses out."""

    def log_speed(self, *_: Any, **__: Any) -> None:
        """Leave it out; a cell is timed as a whole."""

    def save(self, *_: Any, **__: Any) -> None:
        """Save nothing."""


class Lesson:
    """A set of teachers, opened and calibrated; any module may be a student of it.

    Args:
        architecture: timm's name of the parent, whose grid all children have.
        teachers: As on the command line; the parent comes first.
    """

    def __init__(self, base: Distill, architecture: str, teachers: list[str]):
        specs = tuple(map(TeacherSpec.parse, teachers))
        self.config = replace(base, student=architecture, teachers=specs)
        self.setup: Setup = prepare(self.config)
        with tempfile.TemporaryDirectory() as folder:
            found = fit_normalizers(Run(Path(folder)), self.setup)
        self.calibration: Calibration = found[self.config.normalise]

    def feed(self) -> Recorded:
        """Decode the views of all steps."""
        setup, config = self.setup, self.config
        plan = Plan(len(setup.train), config.batch, config.seed)
        feed = ImageFeed(setup.train, setup.view, plan, setup.device, workers=setup.workers)
        return Recorded(feed, config.steps)

    def student(self, child: nn.Module) -> Student:
        """Give a module, whoever made it, a head for each teacher."""
        config, widths = self.config, self.setup.widths
        torch.manual_seed(config.seed)
        head: dict[str, Any] = config.heads.options() | dict(hidden=head_hidden(widths))
        shown = resolve_model_data_config(child)
        student = Student(
            child.cpu(),
            build_heads(child, widths, size=config.size, **head),
            size=(config.size, config.size),
            mean=tuple(shown["mean"]),
            std=tuple(shown["std"]),
            recipe=(config.student, {}),
            head=head,
        )
        return in_precision(student, config.precision).to(self.setup.device)

    def learn(self, child: nn.Module, feed: Recorded) -> tuple[Student, float]:
        """Train a child, in place; return it with heads, and the seconds of the training."""
        config, setup = self.config, self.setup
        student = self.student(child)
        task = DistillTask.of(
            config, student, feed.plan, setup.teachers, self.calibration, setup.grids
        )
        parts = dict(weighting=task.weighting)
        state = TrainState.of(student.train(), config.optim, parts=parts)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(task, state, feed, config, Unwritten(Path(folder)), title="learn")
            synchronise(setup.device)
        return student.eval(), time.perf_counter() - began

    @torch.no_grad()
    def far(self, student: Student, batches: list[Batch]) -> dict[str, float]:
        """Compare a trained student's heads with the teachers, on held-out images."""
        with self.setup.autocast():
            shown = folded(student, self.calibration.normalizers)
            found = dict(fidelity(shown, self.setup.teachers, batches))
        label = self.config.labels[0]
        return dict(fidelity=found[f"fidelity/{label}"], cosine=found[f"cosine/{label}/summary"])


class Classes:
    """Labelled images on the device, for kNN and the linear probe, decoded once."""

    def __init__(self, setup: Setup, most: int):
        assert setup.labelled is not None, "the labelled images have no classes"
        self.setup = setup
        self.sides = [batches_of(side, setup, most) for side in setup.labelled]

    def measure(self, backbone: nn.Module) -> dict[str, float]:
        """Return the accuracies of the pooled vector, in per cent."""
        student: Any = self._shell(backbone)
        with self.setup.autocast():
            bank, queries = (extract(student.features, side) for side in self.sides)
        assert bank.labels is not None and queries.labels is not None
        device = self.setup.device
        tensors = (bank.summaries, bank.labels, queries.summaries, queries.labels)
        sets = [x.to(device) for x in tensors]
        found = {**dict(knn(*sets)), **dict(linear_probe(*sets))}
        return {name.partition("/")[0]: value for name, value in found.items()}

    def _shell(self, backbone: nn.Module) -> Student:
        config, shown = self.setup.config, resolve_model_data_config(backbone)
        size = (config.size, config.size)
        own: dict[str, Any] = dict(mean=tuple(shown["mean"]), std=tuple(shown["std"]))
        return (
            Student(backbone, {}, size=size, recipe=("", {}), head={}, **own)
            .eval()
            .to(self.setup.device)
        )


def batches_of(source: Source, setup: Setup, most: int) -> list[Batch]:
    """Decode images of a source, as they are evaluated."""
    config = setup.config
    found = eval_batches(spread(source, most), config.size, config.batch, workers=setup.workers)
    return [batch.to(setup.device) for batch in found]


def base_config(args: Any, data: Path, labelled: Path) -> Distill:
    """Return what all lessons share; teachers and student are set by each."""
    return Distill(
        data=str(data),
        labelled=str(labelled),
        teachers=(TeacherSpec(name="timm:tf_efficientnet_lite0/wheel"),),
        size=args.size,
        batch=args.batch,
        steps=args.steps,
        workers=args.workers,
        calibration=args.calibration,
        optim=Optim(lr=args.lr, ema=0.0),
        every=Every(log=max(1, args.steps // 2), checkpoint=args.steps, evaluate=10**6),
    )


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
