"""What a benchmark is given, and what it gives. The table of benchmarks: `zoo.eval.benchmarks`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.benchmarks import BENCHMARKS
from zoo.eval.extract import Extracted
from zoo.features import Batch, Features
from zoo.students.student import Student


class Picture(NamedTuple):
    """Something to look at: boxes or masks drawn on an image, uint8 [H W 3]."""

    pixels: np.ndarray
    caption: str = ""


class Scores(NamedTuple):
    """A number with the images that it is made of, so that two models can be compared in pairs.

    The number is 100 · mean over columns of Σ top / Σ bottom, sums over images; columns without
    any bottom are left out. Accuracy: `top` is 1 for what is right, `bottom` nothing. Mean IoU: a
    column a class, intersections over unions.
    """

    keys: Sequence[str]
    """Names of the images, the same for every model."""
    top: np.ndarray
    """[n] or [n, columns]."""
    bottom: np.ndarray | None = None
    """Of the same shape; one an image if not given."""

    @property
    def value(self) -> float:
        """The number itself, in per cent."""
        return float(ratio_of_sums(self.top.sum(axis=0), self._under().sum(axis=0)))

    def _under(self) -> np.ndarray:
        return np.ones_like(self.top, dtype=np.float64) if self.bottom is None else self.bottom

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `top` and `bottom` as float64 [n, columns]."""
        n = len(self.top)
        return (
            np.asarray(self.top, np.float64).reshape(n, -1),
            np.asarray(self._under(), np.float64).reshape(n, -1),
        )


def ratio_of_sums(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Return 100 · the mean of top / bottom along the last axis, where there is any bottom."""
    top, bottom = np.atleast_1d(top), np.atleast_1d(bottom)
    known = bottom > 0
    ratio = np.divide(top, bottom, out=np.zeros(top.shape, np.float64), where=known)
    count = known.sum(axis=-1)
    mean = ratio.sum(axis=-1) / np.maximum(count, 1)
    return np.where(count > 0, 100 * mean, np.nan)


Parts = Scores | AveragePrecision
"""A number with what each image adds to it."""
Value = float | Parts | Picture
Found = tuple[str, Value]


class Images(Protocol):
    """One part of a data set of whole images: what `Subject.open` gives."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


Split = Literal["train", "val"]


def _no_images(data: Path, split: Split) -> Images:
    raise ValueError(f"{data} cannot be opened: this subject was made without a reader of images.")


@dataclass(kw_only=True)
class Subject:
    """The model under test, and what all benchmarks share."""

    name: str
    """As the user wrote it."""
    made: Student | None
    """The network, in eval mode and on the device; none if only its features are at hand."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["float32", "amp"] = "float32"
    """`amp` is autocast to bfloat16."""
    batch: int = 64
    seed: int = 0
    open: Callable[[Path, Split], Images] = _no_images
    """Open the training or the validation part of labelled images: batches on the device at
    the subject's size, centre crops, in order."""
    read: Callable[[Path], tuple[Extracted, Extracted]] | None = None
    """Return the features of both parts from where they were stored, instead of from images."""
    known: dict[Path, tuple[Extracted, Extracted]] = field(default_factory=dict, repr=False)
    work: Path | None = None
    """Folder for the training of a benchmark that trains; one that was stopped there goes on."""

    @property
    def student(self) -> Student:
        """The network: `student.backbone`, `student.size`, and its heads by `student(batch)`.

        Raises:
            ValueError: only features are at hand.
        """
        if self.made is None:
            raise ValueError(
                f"{self.name} is known by its features alone; --features serves what reads "
                f"features: {', '.join(n for n, b in BENCHMARKS.items() if b.reads == 'features')}."
            )
        return self.made

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the network is run."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def features(self, batch: Batch, size: tuple[int, int] | None = None) -> Features:
        """Return the backbone's features, in the subject's precision."""
        with torch.no_grad(), self.autocast():
            return self.student.features(batch, size)

    def extracted(self, data: Path) -> tuple[Extracted, Extracted]:
        """Return the summaries of both parts of labelled images; each data set is looked at once.

        Raises:
            ValueError: the images have no classes.
        """
        if data not in self.known:
            self.known[data] = self.read(data) if self.read else self._extract(data)
        return self.known[data]

    def _extract(self, data: Path) -> tuple[Extracted, Extracted]:
        from zoo.eval.extract import extract

        parts = self.open(data, "train"), self.open(data, "val")
        if not parts[0].classes:
            raise ValueError(
                f"{data} has no classes: one sub-folder a class, or .cls in the shards."
            )
        bank, queries = (extract(self.features, part) for part in parts)
        return bank, queries
