"""The controls: a student that was never trained, and one that learns the labels alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from zoo.data.feed import ImageFeed, plan_of
from zoo.data.sources import Source, open_labelled
from zoo.data.views import View
from zoo.experiments.labels import LabelsTask, with_classifier
from zoo.experiments.pictures import HELD_OUT
from zoo.experiments.real.cells import Cell, options_of, shared
from zoo.experiments.real.config import RealExperiment
from zoo.students.build import build_student, read_options
from zoo.students.student import Student
from zoo.train.config import Augment, Training
from zoo.train.device import device_of, workers_of
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class LabelsTraining(Training):
    """The config of a student that learns labels alone."""

    kind: ClassVar[str] = "experiment"
    size: int


@dataclass(frozen=True, eq=False)
class AllClasses:
    """Labelled sources, one behind another; the classes of each are counted after those before."""

    parts: tuple[Source, ...]

    @property
    def begins(self) -> list[int]:
        """Where each source begins, and where the last ends."""
        return [0, *accumulate(map(len, self.parts))]

    @property
    def classes(self) -> Sequence[str]:
        return [f"{i}/{name}" for i, part in enumerate(self.parts) for name in part.classes]

    def __len__(self) -> int:
        return self.begins[-1]

    def _at(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.begins, index, side="right")) - 1
        return part, index - self.begins[part]

    def key(self, index: int) -> str:
        part, inside = self._at(index)
        return f"{part}/{self.parts[part].key(inside)}"

    def label(self, index: int) -> int | None:
        part, inside = self._at(index)
        label = self.parts[part].label(inside)
        before = sum(len(earlier.classes) for earlier in self.parts[:part])
        return None if label is None else before + label

    def read(self, index: int) -> bytes:
        part, inside = self._at(index)
        return self.parts[part].read(inside)


def untrained(config: RealExperiment, cell: Cell) -> Student:
    """Build the backbone with which every arm of a student and a seed begins, without heads."""
    texts = options_of(cell.student) if cell.student == config.resolved else ()
    torch.manual_seed(cell.seed)  # as a distillation does; the backbone is drawn before the heads
    return build_student(
        cell.student, {}, size=config.size, options=read_options(texts), dynamic=False
    )


def learn_labels(config: RealExperiment, cell: Cell, folders: Sequence[Path]) -> Student:
    """Train a student on the labels of all data sets together; go on with a training that stopped.

    It has the views, the rate, the batch and the steps of the distilled ones.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    device, augment = device_of(config.device), Augment()
    training = LabelsTraining(**shared(config, cell))
    source = AllClasses(tuple(open_labelled(folder, HELD_OUT)[0] for folder in folders))
    run = Run.begin(training)
    student = with_classifier(untrained(config, cell), len(source.classes)).to(device)
    state = TrainState.of(student.train(), training.optim)
    state.resume(run)
    decoder = "torch" if device.type == "cuda" else "pillow"
    crops: dict[str, Any] = asdict(augment)
    view = View(size=config.size, decoder=decoder, **crops)
    plan = plan_of(source, config.batch, cell.seed)
    feed = ImageFeed(source, view, plan, device, workers=workers_of(config.workers, device))
    train(LabelsTask(), state, feed, training, run, title=cell.key)
    return student.eval()
