"""`zoo eval --dry-run`: what would be measured, on how many images, and about how long it takes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from rich.table import Table

from zoo.commands.evaluate.run import completed, plain
from zoo.data.sources import open_labelled, open_whole
from zoo.eval.benchmarks import BENCHMARKS, kind_of, settings_of
from zoo.eval.registry import check_classes
from zoo.eval.speed.cost import known_cost
from zoo.eval.subject import HELD_OUT, EvalRequest
from zoo.language.open import open_language_model
from zoo.multimodal.open import vlm_folder
from zoo.teachers.name import unknown_name
from zoo.train.distill.plan_cost import EFFICIENCY, matmul_rate
from zoo.wheels import without_tag

Work = tuple[str, float]
"""What there is, in words, and the passes of one image through the network that it takes."""


Planned = tuple[EvalRequest, Mapping[str, Sequence[Work]]]
"""A request with the benchmarks that its target is measured on, and the work of each data set."""


def check_plan(target: str | None, request: EvalRequest) -> Planned:
    """Refuse, without loading any weights, what an evaluation would be refused for.

    Raises:
        ValueError: the target is unknown or of another kind; data is missing or not as it should
            be.
    """
    request = completed(target, request)
    if target is not None and kind_of(request.on) == "multimodal":
        vlm_folder(target)
    elif target is not None and kind_of(request.on) == "language":
        open_language_model(target, device="meta")
    elif target is not None and not _is_known(target):
        raise unknown_name(target, timm.list_models(), "run, export or registered model")
    return request, {name: _works(name, request) for name in request.on}


def _works(name: str, request: EvalRequest) -> list[Work]:
    if name not in WORK:
        return []
    settings = request.settings.get(name) or settings_of(name)()
    return [WORK[name](path, settings) for path in request.data.get(name, ())]


def show_plan(targets: Sequence[str | None], request: EvalRequest) -> None:
    """Print what would be measured: the data is opened and checked, and no weights are loaded.

    Raises:
        ValueError: what an evaluation would be refused for.
    """
    plans = [check_plan(target, request) for target in targets]
    table = Table("target", "benchmark", "data", "images", "settings", title="would measure")
    flops: float | None = 0.0
    for target, (asked, works) in zip(targets, plans, strict=True):
        for name in asked.on or ("run",):
            paths = asked.data.get(name, ())
            settings = asked.settings.get(name) or (
                settings_of(name)() if name in BENCHMARKS else None
            )
            work = works.get(name, ())
            shown = ", ".join(f"{k}={v}" for k, v in plain(settings).items()) if settings else ""
            texts = (target or asked.features, name, asked.features or _joined(paths))
            table.add_row(*map(str, texts), "; ".join(words for words, _ in work), shown)
            own = _flops(target, settings, name, work, asked)
            flops = None if flops is None or own is None else flops + own
    Console(width=None if sys.stdout.isatty() else PIPED).print(table)
    out = request.out or "the screen only (--out FILE.jsonl keeps them)"
    print(f"on {request.place}, {request.precision}, batches of {request.batch}, ", end="")
    print(f"seed {request.seed}; results to {out}")
    if flops:
        seconds = flops / (EFFICIENCY * matmul_rate(request.place))
        print(f"about {seconds:,.0f} s for the network; reading images comes on top")


def _joined(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _is_known(target: str) -> bool:
    return Path(target).exists() or timm.is_model(target.partition(".")[0])


def _flops(
    target: str | None, settings: Any, name: str, work: Sequence[Work], request: EvalRequest
) -> float | None:
    """Return the FLOPs of a benchmark; `None` if they are not known without the weights."""
    if not work or request.features is not None:
        return 0.0
    model = without_tag(target or "")
    if not timm.is_model(model.partition(".")[0]):
        return None
    own = timm.get_pretrained_cfg(model)
    side = getattr(settings, BENCHMARKS[name].side, None) if BENCHMARKS[name].side else None
    side = side or request.size or (own.input_size[-1] if own else 224)
    found = known_cost(f"{model.partition('.')[0]},num_classes=0", side)
    return None if found is None else 2 * found[1] * sum(passes for _, passes in work)


def _labelled(path: Path, settings: Any) -> Work:
    train, val = open_labelled(path, held_out=HELD_OUT)
    check_classes(train.classes, path)
    words = f"{len(train):,} + {len(val):,}, {len(train.classes)} classes"
    return words, len(train) + len(val)


def _whole(path: Path, settings: Any) -> Work:
    images = open_whole(path)
    return f"{len(images):,}", len(images)


def _segments(path: Path, settings: Any) -> Work:
    from zoo.eval.dense.segment_data import open_segments

    train, val = open_segments(path, settings.layout)
    words = f"{len(train):,} + {len(val):,}, {len(train.classes)} classes"
    return words, settings.steps * settings.batch + WINDOWS * len(val)


def _depths(path: Path, settings: Any) -> Work:
    from zoo.eval.dense.depth import open_depths

    train, val = open_depths(path, settings)
    words = f"{len(train):,} + {len(val):,}"
    return words, settings.steps * settings.batch + WINDOWS * len(val)


def _coco(path: Path, settings: Any) -> Work:
    from zoo.eval.detect.coco import open_coco

    train, val = (open_coco(path, part) for part in ("train", "val"))
    words = f"{len(train):,} + {len(val):,}, {len(train.classes)} classes"
    passes = 3 * settings.training.steps * settings.training.batch  # forward and backward
    return words, passes + len(val)


PIPED = 200
"""Columns, where the output is no terminal."""
WINDOWS = 2
"""Windows of an image of usual proportions that are measured."""
WORK: Mapping[str, Callable[[Path, Any], Work]] = {
    "knn": _labelled,
    "linear": _labelled,
    "fewshot": _labelled,
    "similar": _labelled,
    "classify": _whole,
    "zeroshot": _whole,
    "masks": _whole,
    "segment": _segments,
    "depth": _depths,
    "detect": _coco,
}
"""Benchmark -> what opens and checks its data, and counts its work."""
