"""The table of benchmarks that `zoo eval --on` knows; importing it does not import torch.

A benchmark is a generator of named values. To add one, write it and add a line to `BENCHMARKS`:

    @dataclass(frozen=True, kw_only=True)
    class SegmentSettings:               # `--segment.crop 768` on the command line
        crop: int = 512
        '''Side of a window, in pixels.'''

    def segment(subject: Subject, data: Path, settings: SegmentSettings) -> Iterator[Found]:
        maps = subject.features(batch).spatial        # or subject.student, for its heads
        yield "segment/miou", 61.2                    # a number
        yield "segment/miou", Scores(keys, hits, total)     # a number, with each image's part in it
        yield "segment/000123", Picture(pixels, "mask")     # shown in the report

    BENCHMARKS["segment"] = Benchmark(
        "zoo.eval.dense.segment:segment", "segmentation", "segment/miou"
    )

The command line finds the settings by the annotation of the function's third parameter, unless the
row names them (`settings`), which saves `--help` the benchmark's own imports.
Random numbers must follow from `subject.seed`. A number has its usual unit
(per cent for accuracies and IoU); `best` in the table is the number of a perfect model.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_type_hints

BenchmarkFunction = Callable[..., Any]
"""(subject, data, settings) -> named values; see `zoo.eval.registry`."""


Kind = Literal["vision", "language", "multimodal"]
WORDS: dict[Kind, str] = {
    "vision": "vision models",
    "language": "language models",
    "multimodal": "models of images and text",
}


class Benchmark(NamedTuple):
    """A row of the table of benchmarks."""

    run: str
    """`module:function`; imported when the benchmark is run."""
    capability: str
    """What it measures, in a word or two: an axis of the report's radar."""
    headline: str
    """The number that represents it in tables and plots."""
    best: float = 100.0
    """The headline of a perfect model; 0 where there is no upper limit, and then no radar axis."""
    reads: Literal["features", "data", "nothing"] = "data"
    """`features`: summaries of labelled images, possibly stored by `zoo embed`; `data`: the folder
    itself; `nothing`: no data."""
    model: Kind = "vision"
    """What is measured: a backbone by images, a language model by text (`TextSubject`), or a model
    of both by questions (`ImageTextSubject`)."""
    settings: str = ""
    """`module:class`; by default the annotation of the function's third parameter."""
    side: str = ""
    """The field of the settings with the side of the images in pixels, where that is not the
    subject's own: the cost of the model that is recorded is that at this side."""
    check: str = ""
    """`module:function`, (subject, data, settings) -> the settings as they are used, which are
    recorded; called for all benchmarks before the first begins, with a list of folders. It raises
    a ValueError for what the benchmark would refuse."""
    spread: bool = False
    """On several ranks each carries the benchmark out: it gathers what they found, and rank 0 alone
    yields. Otherwise rank 0 carries it out while the others wait, but that summaries (`reads` is
    `features`) are extracted by all."""


BENCHMARKS: dict[str, Benchmark] = {
    "knn": Benchmark(
        "zoo.eval.knn:measure",
        "kNN",
        "knn/top1",
        reads="features",
        settings="zoo.eval.settings:KnnSettings",
        check="zoo.eval.knn:used",
    ),
    "linear": Benchmark(
        "zoo.eval.linear:measure",
        "linear probe",
        "linear/top1",
        reads="features",
        settings="zoo.eval.settings:LinearSettings",
        check="zoo.eval.knn:used",
    ),
    "fewshot": Benchmark(
        "zoo.eval.fewshot:fewshot",
        "few-shot",
        "fewshot/5/top1",
        reads="features",
        settings="zoo.eval.settings:FewshotSettings",
        check="zoo.eval.fewshot:used",
    ),
    "similar": Benchmark(
        "zoo.eval.similar:similar",
        "similar images",
        "similar/map",
        reads="features",
        settings="zoo.eval.settings:SimilarSettings",
        check="zoo.eval.knn:used",
    ),
    "classify": Benchmark(
        "zoo.eval.classify:classify",
        "classification",
        "classify/top1",
        settings="zoo.eval.settings:ClassifySettings",
        check="zoo.eval.classify:used",
        spread=True,
    ),
    "zeroshot": Benchmark(
        "zoo.eval.zeroshot:zeroshot",
        "zero-shot",
        "zeroshot/top1",
        settings="zoo.eval.settings:ZeroShotSettings",
        check="zoo.eval.zeroshot:used",
        spread=True,
    ),
    "segment": Benchmark(
        "zoo.eval.dense.segment:segment",
        "segmentation",
        "segment/miou",
        settings="zoo.eval.settings:SegmentSettings",
        check="zoo.eval.dense.segment:used",
        side="crop",
    ),
    "retrieval": Benchmark(
        "zoo.eval.retrieval:retrieval",
        "retrieval",
        "retrieval/image_to_text/recall5",
        settings="zoo.eval.settings:RetrievalSettings",
        check="zoo.eval.retrieval:used",
        spread=True,
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
        check="zoo.eval.dense.depth:used",
        side="crop",
    ),
    "masks": Benchmark(
        "zoo.eval.dense.sam_masks:masks",
        "masks",
        "masks/miou",
        settings="zoo.eval.settings:SamMasksSettings",
        check="zoo.eval.dense.sam_masks:used",
        spread=True,
    ),
    "detect": Benchmark(
        "zoo.eval.detect.benchmark:detect",
        "detection",
        "detect/box/AP50",
        settings="zoo.eval.detect.config:DetectSettings",
        side="size",
        check="zoo.eval.detect.benchmark:used",
    ),
    "speed": Benchmark(
        "zoo.eval.speed.throughput:speed",
        "images/s",
        "speed/img_s",
        best=0.0,
        reads="nothing",
        settings="zoo.eval.settings:SpeedSettings",
    ),
    "perplexity": Benchmark(
        "zoo.eval.language.perplexity:perplexity",
        "bits a byte",
        "perplexity/bpb",
        best=0.0,
        model="language",
        settings="zoo.eval.settings:PerplexitySettings",
    ),
    "copying": Benchmark(
        "zoo.eval.language.recall:copying",
        "copying",
        "copying/exact",
        reads="nothing",
        model="language",
        settings="zoo.eval.settings:CopyingSettings",
    ),
    "phonebook": Benchmark(
        "zoo.eval.language.recall:phonebook",
        "phone book",
        "phonebook/exact",
        reads="nothing",
        model="language",
        settings="zoo.eval.settings:PhonebookSettings",
    ),
    "needle": Benchmark(
        "zoo.eval.language.recall:needle",
        "needle",
        "needle/exact",
        reads="nothing",
        model="language",
        settings="zoo.eval.settings:NeedleSettings",
    ),
    "lmeval": Benchmark(
        "zoo.eval.language.harness:lmeval",
        "lm-eval",
        "lmeval/mean",
        model="language",
        settings="zoo.eval.settings:LmEvalSettings",
    ),
    "vqa": Benchmark(
        "zoo.eval.multimodal.vqa:vqa",
        "questions",
        "vqa/exact",
        model="multimodal",
        settings="zoo.eval.settings:VqaSettings",
    ),
    "sight": Benchmark(
        "zoo.eval.multimodal.vqa:sight",
        "drawn questions",
        "sight/exact",
        reads="nothing",
        model="multimodal",
        settings="zoo.eval.settings:SightSettings",
    ),
    "prefill": Benchmark(
        "zoo.eval.multimodal.prefill:prefill",
        "ms to the first token",
        "prefill/ms",
        best=0.0,
        reads="nothing",
        model="multimodal",
        settings="zoo.eval.settings:PrefillSettings",
    ),
}
"""Name on the command line -> benchmark."""
DEFAULT = ("knn", "linear")
"""The benchmarks of a model on labelled images, unless --on names others."""


def kind_of(names: Sequence[str]) -> Kind:
    """Tell what benchmarks measure; vision models if there are none.

    Raises:
        ValueError: they measure models of several kinds.
    """
    kinds: dict[Kind, str] = {BENCHMARKS[name].model: name for name in names}
    if len(kinds) > 1:
        measured = " and ".join(f"{kinds[kind]} measures {WORDS[kind]}" for kind in sorted(kinds))
        raise ValueError(f"{measured}; name them in two commands.")
    for kind in kinds:
        return kind
    return "vision"


def find(names: Sequence[str]) -> list[str]:
    """Check names of benchmarks before any work starts, and return each of them once.

    Raises:
        ValueError: there is no benchmark of that name; the message suggests the nearest.
    """
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(BENCHMARKS)
            raise ValueError(f"There is no benchmark {name!r}; there are {known}.{hint}")
    return list(dict.fromkeys(names))


def load(name: str) -> tuple[BenchmarkFunction, type[Any]]:
    """Import a benchmark; return its function and the class of its settings.

    Raises:
        ValueError: there is no such benchmark, or it needs a package that is not installed.
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
    """Return the class of a benchmark's settings, for the command line.

    Raises:
        ValueError: as `load`.
    """
    (found,) = find([name])
    place = BENCHMARKS[found].settings
    return _imported(place) if place else load(name)[1]


def checked_settings(name: str, subject: Any, data: Sequence[Any], settings: Any) -> Any:
    """Return the settings of a benchmark as they are used; `data` are all its folders.

    Raises:
        ValueError: the benchmark would refuse its subject, its data or its settings.
    """
    check = BENCHMARKS[name].check
    return _imported(check)(subject, data, settings) if check else settings


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def headlines() -> Mapping[str, Benchmark]:
    """Return the benchmarks by their headline numbers."""
    return {benchmark.headline: benchmark for benchmark in BENCHMARKS.values()}
