"""Gather what many runs and result files say about each model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from zoo.eval.benchmarks import Benchmark, headlines
from zoo.eval.report.run_folder import RunFolder, number, read_run
from zoo.eval.results import SUFFIX, Record, latest, read


class Measure(NamedTuple):
    """The name of a number, and the data on which it was measured."""

    name: str
    data: str

    def describe(self) -> str:
        """Return the text for the head of a column."""
        return f"{self.name} · {self.data}" if self.data else self.name


@dataclass(kw_only=True)
class Model:
    """What all sources say about one model."""

    name: str
    values: dict[Measure, float | None] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """`name`, `size`, `parameters` and `macs`, as far as known."""
    records: list[Record] = field(default_factory=list)
    run: RunFolder | None = None

    @property
    def rate(self) -> float | None:
        """Images per second, if the speed was measured."""
        return next((v for m, v in self.values.items() if m.name == "speed/img_s"), None)


def gather(sources: Sequence[str | Path]) -> tuple[list[Model], list[str]]:
    """Read folders of runs and result files; return the models, and notes on unreadable parts.

    The models are in the order of their first mention. A run and the results of its export are one
    model.

    Raises:
        ValueError: a source is neither the folder of a run nor a result file.
    """
    found: dict[str, Model] = {}
    notes: list[str] = []

    def model_of(target: str) -> Model:
        return found.setdefault(_identity(target), Model(name=_label(target)))

    for source in map(Path, sources):
        if source.suffix == SUFFIX or source.is_file():
            for record in latest(read(source)):
                _add_record(model_of(record.target), record)
            continue
        run = read_run(source)
        _add_run(model_of(str(source)), run)
        notes += [f"{source}: {note}" for note in run.notes]
    _tell_apart(list(found.values()))
    return list(found.values()), notes


def _label(target: str) -> str:
    return target.rstrip("/").removesuffix("/export")


def _identity(target: str) -> str:
    place = Path(_label(target))
    return str(place.resolve()) if place.exists() else _label(target)


def _tell_apart(models: list[Model]) -> None:
    """Shorten names to the last part of their paths, if these are all different."""
    short = [Path(model.name).name for model in models]
    if len(set(short)) == len(short):
        for model, name in zip(models, short, strict=True):
            model.name = name


def _add_record(model: Model, record: Record) -> None:
    model.records.append(record)
    model.about |= {key: value for key, value in record.model.items() if value is not None}
    data = Path(record.data).name if record.data else ""
    model.values |= {Measure(name, data): value for name, value in record.values.items()}


def _add_run(model: Model, run: RunFolder) -> None:
    model.run = run
    student = run.about.get("student")
    if isinstance(student, dict):
        known = dict(
            name=student.get("name"),
            parameters=number(student.get("params")),
            macs=number(student.get("macs")),
            size=run.config.get("size"),
        )
        model.about = {k: v for k, v in known.items() if v is not None} | model.about
    data = run.config.get("data")
    place = Path(data).name if isinstance(data, str) and data else "its own images"
    own = ("kind", "step", "time")
    for name, value in run.ours.items():
        if name not in own:
            model.values.setdefault(Measure(name, place), value)


def headline_columns(models: Sequence[Model]) -> list[tuple[Measure, Benchmark]]:
    """Return the measures that are the headline of a benchmark, in the order of `BENCHMARKS`."""
    known = headlines()
    measures = list(dict.fromkeys(m for model in models for m in model.values))
    return [
        (measure, benchmark)
        for name, benchmark in known.items()
        for measure in measures
        if measure.name == name
    ]
