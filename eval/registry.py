"""The table that `zoo eval --on` reads, and what a benchmark is given and gives.

A benchmark is one generator. To add one, write it and add one line to `BENCHMARKS`:

    @dataclass(frozen=True, kw_only=True)
    class Segment:                       # its settings: `--segment.crop 768` on the command line
        crop: int = 512
        '''Pixels of a window's side.'''

    def segment(subject: Subject, data: Path, settings: Segment) -> Iterator[Found]:
        maps = subject.look(batch).spatial           # or subject.student, for its heads
        yield "segment/miou", 61.2                    # a number
        yield "segment/miou", Scores(keys, hits, total)     # a number, and where it comes from
        yield "segment/000123", Picture(pixels, "mask")     # shown in the report

    BENCHMARKS["segment"] = Benchmark(
        "zoo.eval.dense.segment:segment", "segmentation", "segment/miou"
    )

The function's third parameter is annotated with the settings' class: that is how the command line
finds it. Modules are imported when they are asked for, so a benchmark may import what it likes.
What it draws at random it draws from `subject.seed`. A number is in the unit that the field uses
(per cent for accuracies and IoU); `best` in the table says what a perfect one is.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_type_hints

import numpy as np
import torch

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.extract import Extracted
from zoo.features import Batch, Features
from zoo.students.student import Student


class Picture(NamedTuple):
    """An image for the report, for example with boxes or masks drawn on it."""

    pixels: np.ndarray
    """uint8 [H W 3]."""
    caption: str = ""


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
Value = float | Parts | Picture
Found = tuple[str, Value]


class Images(Protocol):
    """The training or the validation part of a set of images, in batches; see `Subject.open`."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


Split = Literal["train", "val"]


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
    open: Callable[[Path, Split], Images] = _no_images
    """Open the training or the validation part of a folder of images: centre crops of the subject's
    size, in batches on the device, in the order of the files."""
    read: Callable[[Path], tuple[Extracted, Extracted]] | None = None
    """Read the stored features of both parts, in place of extracting them from images."""
    known: dict[Path, tuple[Extracted, Extracted]] = field(default_factory=dict, repr=False)
    """What `extracted` has returned, by data set."""

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

    def extracted(self, data: Path) -> tuple[Extracted, Extracted]:
        """Return the summaries of the training and the validation part of labelled images.

        The features of a data set are computed only once.

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


Run = Callable[[Subject, Any, Any], Iterable[Found]]


class Benchmark(NamedTuple):
    """A line of the table."""

    run: str
    """`module:function`, imported when the benchmark is asked for."""
    capability: str
    """What it tells about a model: an axis of the report's radar."""
    headline: str
    """The one number that stands for it in tables and plots."""
    best: float = 100.0
    """The headline of a perfect model; 0 where there is none, and no axis then."""
    reads: Literal["features", "data", "nothing"] = "data"
    """`features`: summaries of labelled images, which may come from `zoo embed`; `data`: the
    folder itself; `nothing`: no data at all."""


BENCHMARKS: dict[str, Benchmark] = {
    "knn": Benchmark("zoo.eval.knn:measure", "kNN", "knn/top1", reads="features"),
    "linear": Benchmark("zoo.eval.linear:measure", "linear probe", "linear/top1", reads="features"),
    "fewshot": Benchmark(
        "zoo.eval.fewshot:fewshot", "few-shot", "fewshot/5/top1", reads="features"
    ),
    "zeroshot": Benchmark("zoo.eval.zeroshot:zeroshot", "zero-shot", "zeroshot/top1"),
    "segment": Benchmark("zoo.eval.dense.segment:segment", "segmentation", "segment/miou"),
    "retrieval": Benchmark(
        "zoo.eval.retrieval:retrieval", "retrieval", "retrieval/image_to_text/recall5"
    ),
    "correspondence": Benchmark(
        "zoo.eval.dense.correspondence:correspondence", "correspondence", "correspondence/pck0.1"
    ),
    "depth": Benchmark("zoo.eval.dense.depth:depth", "depth", "depth/delta1"),
    "masks": Benchmark("zoo.eval.dense.sam_masks:masks", "masks", "masks/miou"),
    "detect": Benchmark("zoo.eval.detect.benchmark:detect", "detection", "detect/box/AP50"),
    "speed": Benchmark(
        "zoo.eval.speed.throughput:speed", "images/s", "speed/img_s", 0.0, "nothing"
    ),
}
"""Name -> what `zoo eval --on` runs; a new benchmark is one line."""


def find(names: Sequence[str]) -> list[str]:
    """Check names of benchmarks, before any work starts.

    Raises:
        ValueError: a name that the table does not have, with the nearest that it has.
    """
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(BENCHMARKS)
            raise ValueError(f"There is no benchmark {name!r}; there are {known}.{hint}")
    return list(dict.fromkeys(names))


def load(name: str) -> tuple[Run, type[Any]]:
    """Import a benchmark: its function and the class of its settings.

    Raises:
        ValueError: it is not installed here, or needs a package that is missing.
    """
    (found,) = find([name])
    module, _, function = BENCHMARKS[found].run.partition(":")
    try:
        run = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The benchmark {name} needs {error.name}, which is not installed; see the extras of "
            "backbone-zoo (pip install 'backbone-zoo[all]')."
        ) from error
    settings = get_type_hints(run).get("settings")
    assert isinstance(settings, type) and is_dataclass(settings), f"{function} has no settings"
    return run, settings


def headlines() -> Mapping[str, Benchmark]:
    """Return the benchmarks by the number that stands for each."""
    return {benchmark.headline: benchmark for benchmark in BENCHMARKS.values()}
