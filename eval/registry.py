"""The input and the output of a benchmark; the table of benchmarks is `zoo.eval.benchmarks`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.benchmarks import BENCHMARKS
from zoo.eval.examples import Example
from zoo.eval.extract import Extracted, extract_share
from zoo.features import Batch, Features
from zoo.students.student import Student
from zoo.train.mesh import from_first, union


class Picture(NamedTuple):
    """An image for the report, for example with boxes or masks drawn on it."""

    pixels: np.ndarray
    """uint8 [H W 3]."""
    caption: str = ""
    table: Sequence[Sequence[str]] = ()
    """The numbers that are drawn, if they are written beside it as CSV."""


class Scores(NamedTuple):
    """A number with each image's part in it, so that two models can be compared image by image.

    The number is 100 · mean over columns of (Σ top / Σ bottom), with sums over images; columns
    whose bottom sums to 0 are left out. For an accuracy, `top` is 1 where the prediction is right
    and `bottom` is omitted. For a mean IoU, a column is a class, `top` the intersection and
    `bottom` the union.
    """

    keys: Sequence[str]
    """Names of the images; the same for every model."""
    top: np.ndarray
    """[n] or [n, columns]."""
    bottom: np.ndarray | None = None
    """The shape of `top`; ones by default."""

    @property
    def value(self) -> float:
        """The number, in per cent."""
        return float(ratio_of_sums(self.top.sum(axis=0), self._bottom().sum(axis=0)))

    def _bottom(self) -> np.ndarray:
        return np.ones_like(self.top, dtype=np.float64) if self.bottom is None else self.bottom

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `top` and `bottom` as float64 [n, columns]."""
        n = len(self.top)
        return (
            np.asarray(self.top, np.float64).reshape(n, -1),
            np.asarray(self._bottom(), np.float64).reshape(n, -1),
        )


def ratio_of_sums(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Return 100 · mean of top / bottom along the last axis, where the bottom is above 0.

    NaN where no bottom is.
    """
    top, bottom = np.atleast_1d(top), np.atleast_1d(bottom)
    known = bottom > 0
    ratio = np.divide(top, bottom, out=np.zeros(top.shape, np.float64), where=known)
    count = known.sum(axis=-1)
    mean = ratio.sum(axis=-1) / np.maximum(count, 1)
    return np.where(count > 0, 100 * mean, np.nan)


Parts = Scores | AveragePrecision
"""A number with each image's part in it."""
Value = float | Parts | Picture | Example
Found = tuple[str, Value]


class Images(Protocol):
    """The training or the validation part of a set of images, in batches; see `Subject.open`."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def pixels(self, keys: Collection[str]) -> dict[str, np.ndarray]:
        """Read the whole images of these names, as far as they are here: uint8 [H W 3]."""
        ...


Split = Literal["train", "val", "whole"]
"""`whole`: the images of a benchmark that trains on none, so that none need be held out."""


def _no_images(data: Path, split: Split) -> Images:
    raise ValueError(f"{data} cannot be opened: this subject has no reader of images.")


@dataclass(kw_only=True)
class Subject:
    """The model under test, and the settings that all benchmarks share."""

    name: str
    """As the user wrote it."""
    made: Student | None
    """The network, in eval mode and on the device; `None` if only stored features are known."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["float32", "amp"] = "float32"
    """`amp` is autocast to bfloat16."""
    batch: int = 64
    seed: int = 0
    workers: int = 0
    """Processes that decode images."""
    open: Callable[[Path, Split], Images] = _no_images
    """Open the training or the validation part of a folder of images: centre crops of the subject's
    size, in batches on the device, in the order of the files. On several ranks each gets every
    so many-th of the batches, which have numbers."""
    read: Callable[[Path], tuple[Extracted, Extracted]] | None = None
    """Read the stored features of both parts, in place of extracting them from images."""
    known: dict[Path, tuple[Extracted, Extracted]] = field(default_factory=dict, repr=False)
    """What `extracted` has returned, by data set."""
    unreadable: set[str] = field(default_factory=set, repr=False)
    """Names of the images that could not be read and that the benchmark at work has left out."""
    checked: set[tuple[str, ...]] = field(default_factory=set, repr=False)
    """What a benchmark's check has found right, so that it is not opened again."""
    work: Path | None = None
    """Folder for the runs of benchmarks that train; a run that was stopped there is resumed."""

    @property
    def student(self) -> Student:
        """The network: `student.backbone`, `student.size`, and its heads by `student(batch)`.

        Raises:
            ValueError: only stored features are known.
        """
        if self.made is None:
            raise ValueError(
                f"{self.name} is known by its features alone; --features serves only "
                "benchmarks that read features: "
                f"{', '.join(n for n, b in BENCHMARKS.items() if b.reads == 'features')}."
            )
        return self.made

    def autocast(self) -> AbstractContextManager:
        """Return the context manager in which the network is run: autocast for `amp`."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def features(self, batch: Batch, size: tuple[int, int] | None = None) -> Features:
        """Return the backbone's features, in the subject's precision and without gradients.

        Args:
            size: Height and width to which the images are resized; the student's size by default.
        """
        with torch.no_grad(), self.autocast():
            return self.student.features(batch, size)

    def share(self, data: Path) -> None:
        """Extract this rank's share of the summaries, so that rank 0 knows all (`extracted`).

        Every rank calls this.

        Raises:
            ValueError: as `extracted`.
        """
        if self.read is None and from_first(data not in self.known):
            found = self._extract(data)
            if found is not None:
                self.known[data] = found

    def extracted(self, data: Path) -> tuple[Extracted, Extracted]:
        """Return the summaries of the training and the validation part of labelled images.

        The features of a data set are computed only once.

        Raises:
            ValueError: the images have no classes.
        """
        if data not in self.known:
            found = self.read(data) if self.read else self._extract(data)
            assert found is not None  # one process has all of them
            self.known[data] = found
        for part in self.known[data]:
            self.unreadable.update(part.unreadable)
        return self.known[data]

    def _extract(self, data: Path) -> tuple[Extracted, Extracted] | None:
        """Return the summaries of both parts, on rank 0."""
        parts = self.open(data, "train"), self.open(data, "val")
        check_classes(parts[0].classes, data)
        bank, queries = (extract_share(self.features, part) for part in parts)
        union(self.unreadable)
        if bank is None or queries is None:
            return None
        return bank, queries._replace(unreadable=tuple(sorted(self.unreadable)))


def check_classes(classes: Sequence[str], data: Path) -> None:
    """Refuse images without classes.

    Raises:
        ValueError: they have none.
    """
    if not classes:
        raise ValueError(
            f"{data} has no classes: one sub-folder a class, or .cls in the shards, with the "
            "same names in train and val."
        )
