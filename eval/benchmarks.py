"""The table that `zoo eval --on` reads. It is read without torch.

A benchmark is one generator. To add one, write it and add one line to `BENCHMARKS`:

    @dataclass(frozen=True, kw_only=True)
    class SegmentSettings:               # `--segment.crop 768` on the command line
        crop: int = 512
        '''Pixels of a window's side.'''

    def segment(subject: Subject, data: Path, settings: SegmentSettings) -> Iterator[Found]:
        maps = subject.features(batch).spatial        # or subject.student, for its heads
        yield "segment/miou", 61.2                    # a number
        yield "segment/miou", Scores(keys, hits, total)     # a number, and where it comes from
        yield "segment/000123", Picture(pixels, "mask")     # shown in the report

    BENCHMARKS["segment"] = Benchmark(
        "zoo.eval.dense.segment:segment", "segmentation", "segment/miou"
    )

The function's third parameter is annotated with the settings' class: that is how the command line
finds it, unless the line names it (`settings`), which spares `--help` the benchmark's own imports.
What a benchmark draws at random it draws from `subject.seed`. A number is in the unit that the
field uses (per cent for accuracies and IoU); `best` in the table says what a perfect one is.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_type_hints

BenchmarkFunction = Callable[..., Any]
"""(subject, data, settings) -> what it found; see `zoo.eval.registry`."""


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
    settings: str = ""
    """`module:class`; if not given, what the function's third parameter is annotated with."""


BENCHMARKS: dict[str, Benchmark] = {
    "knn": Benchmark(
        "zoo.eval.knn:measure",
        "kNN",
        "knn/top1",
        reads="features",
        settings="zoo.eval.settings:KnnSettings",
    ),
    "linear": Benchmark(
        "zoo.eval.linear:measure",
        "linear probe",
        "linear/top1",
        reads="features",
        settings="zoo.eval.settings:LinearSettings",
    ),
    "fewshot": Benchmark(
        "zoo.eval.fewshot:fewshot",
        "few-shot",
        "fewshot/5/top1",
        reads="features",
        settings="zoo.eval.settings:FewshotSettings",
    ),
    "zeroshot": Benchmark(
        "zoo.eval.zeroshot:zeroshot",
        "zero-shot",
        "zeroshot/top1",
        settings="zoo.eval.settings:ZeroShotSettings",
    ),
    "segment": Benchmark(
        "zoo.eval.dense.segment:segment",
        "segmentation",
        "segment/miou",
        settings="zoo.eval.settings:SegmentSettings",
    ),
    "retrieval": Benchmark(
        "zoo.eval.retrieval:retrieval",
        "retrieval",
        "retrieval/image_to_text/recall5",
        settings="zoo.eval.settings:RetrievalSettings",
    ),
    "correspondence": Benchmark(
        "zoo.eval.dense.correspondence:correspondence",
        "correspondence",
        "correspondence/pck0.1",
        settings="zoo.eval.settings:CorrespondenceSettings",
    ),
    "depth": Benchmark(
        "zoo.eval.dense.depth:depth",
        "depth",
        "depth/delta1",
        settings="zoo.eval.settings:DepthSettings",
    ),
    "masks": Benchmark(
        "zoo.eval.dense.sam_masks:masks",
        "masks",
        "masks/miou",
        settings="zoo.eval.settings:SamMasksSettings",
    ),
    "detect": Benchmark(
        "zoo.eval.detect.benchmark:detect",
        "detection",
        "detect/box/AP50",
        settings="zoo.eval.detect.config:DetectSettings",
    ),
    "speed": Benchmark(
        "zoo.eval.speed.throughput:speed",
        "images/s",
        "speed/img_s",
        best=0.0,
        reads="nothing",
        settings="zoo.eval.settings:SpeedSettings",
    ),
}
"""Name -> what `zoo eval --on` runs; a new benchmark is one line."""
DEFAULT = ("knn", "linear")
"""What is measured of a model on labelled images, unless --on says otherwise."""


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


def load(name: str) -> tuple[BenchmarkFunction, type[Any]]:
    """Import a benchmark: its function and the class of its settings.

    Raises:
        ValueError: it is not installed here, or needs a package that is missing.
    """
    (found,) = find([name])
    try:
        run = _imported(BENCHMARKS[found].run)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The benchmark {name} needs {error.name}, which is not installed; see the extras of "
            "backbone-zoo (pip install 'backbone-zoo[all]')."
        ) from error
    settings = get_type_hints(run).get("settings")
    assert isinstance(settings, type) and is_dataclass(settings), f"{name} has no settings"
    return run, settings


def settings_of(name: str) -> type[Any]:
    """Return the class of a benchmark's settings, which the command line shows.

    Raises:
        ValueError: as `load`.
    """
    (found,) = find([name])
    place = BENCHMARKS[found].settings
    return _imported(place) if place else load(name)[1]


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def headlines() -> Mapping[str, Benchmark]:
    """Return the benchmarks by the number that stands for each."""
    return {benchmark.headline: benchmark for benchmark in BENCHMARKS.values()}
