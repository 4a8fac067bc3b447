"""The sub-commands that measure what was made: `zoo eval`, `zoo embed`, `zoo report`."""

import shlex
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    target: tyro.conf.Positional[str | None] = None
    """A run's folder, an exported student's folder, or a registered model."""
    on: str = ""
    """Benchmarks, separated by commas: knn, linear, fewshot, zeroshot, segment, detect, speed.
    Each has its settings: --on knn --help. A run has numbers of its own without this."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Images for every benchmark; NAME=PATH for one of them alone. May be given several times."""
    features: Path | None = None
    """A folder of zoo embed, read instead of images."""
    compare: tuple[str, str] | None = None
    """Two models, or two result files (FILE.jsonl or FILE.jsonl:TARGET): differences with paired
    bootstrap intervals over images."""
    size: int | None = None
    batch: int = 64
    precision: Literal["float32", "amp"] = "float32"
    """amp is autocast to bfloat16."""
    seed: int = 0
    workers: int = 0
    """Processes that decode images."""
    out: Path | None = None
    """Append each result to this .jsonl file as a line; scores and pictures lie beside it."""
    dry_run: bool = False
    """Print what would be measured, and exit."""


def evaluate(args: list[str]) -> None:
    """Measure a run's student (fidelity, kNN, linear probe), or any model by named benchmarks.

    Examples: zoo eval runs/mine      zoo eval resnet18 --data PHOTOS
    zoo eval runs/mine/export --on knn,fewshot,speed --data PHOTOS --out results.jsonl
    zoo eval --compare results.jsonl:runs/a results.jsonl:runs/b
    """
    from zoo.commands.evaluate import DEFAULT, Asked, compare_targets, read_data, show_plan
    from zoo.commands.evaluate import evaluate as measure
    from zoo.eval.registry import find, load

    on = find([name for name in _value_of(args, "--on").replace(" ", "").split(",") if name])
    kinds = {name: load(name)[1] for name in on or DEFAULT}
    own: list[Any] = [(name, kind, kind()) for name, kind in kinds.items()]
    asked = parse(
        make_dataclass("Args", own, bases=(EvalArgs,), frozen=True, kw_only=True),
        args, "eval", evaluate.__doc__ or "",
    )  # fmt: skip
    if (asked.target is None) == (asked.compare is None and asked.features is None):
        raise ValueError("Name what to measure: one target, or --compare A B, or --features DIR.")
    on = on or (list(DEFAULT) if asked.data or asked.features else [])
    task = Asked(
        on=tuple(on), data=read_data(asked.data, on or DEFAULT),
        settings={name: getattr(asked, name) for name in kinds},
        command=shlex.join(["zoo", "eval", *args]),
        **{name: getattr(asked, name) for name in
           ("features", "size", "batch", "precision", "seed", "workers", "out")},
    )  # fmt: skip
    if asked.dry_run:
        show_plan(asked.compare or (asked.target,), task)
    elif asked.compare:
        first, second = asked.compare
        compare_targets(first, second, task)
    else:
        measure(asked.target, task)


def _value_of(args: list[str], option: str) -> str:
    """Read one option before the others, which depend on it."""
    for place, word in enumerate(args):
        if word == option and place + 1 < len(args):
            return args[place + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def embed(args: list[str]) -> None:
    """Write the features of many images in shards; zoo eval --features reads them.

    Example: zoo embed PHOTOS features/mine --model runs/mine/export --workers 8
    """
    from zoo.commands.embed import Embed
    from zoo.commands.embed import embed as write

    asked = parse(Embed, args, "embed", embed.__doc__ or "")
    print(write(replace(asked, command=shlex.join(["zoo", "embed", *args]))))


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, finished or not, and result files of zoo eval."""
    out: Path | None = None
    """Where the page of several goes; report.html here, unless given."""


def report(args: list[str]) -> None:
    """Write RUN/report.html of one run, or join runs and result files into one page.

    Examples: zoo report runs/mine      zoo report runs/a runs/b results.jsonl --out all.html
    """
    from zoo.eval.report import build_report
    from zoo.eval.report.joined import build_joined

    asked = parse(ReportArgs, args, "report", report.__doc__ or "")
    if not asked.runs:
        raise ValueError("Name at least one run's folder or result file of zoo eval.")
    if len(asked.runs) == 1 and asked.runs[0].suffix != ".jsonl" and asked.out is None:
        print(build_report(asked.runs[0]).resolve())
    else:
        print(build_joined(asked.runs, asked.out or Path("report.html")).resolve())
