"""Gather what many runs and result files say about each model."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from zoo.eval.benchmarks import BENCHMARKS, Benchmark, headlines
from zoo.eval.report.imported import Added
from zoo.eval.report.pruned import is_pruned, read_pruned
from zoo.eval.report.run_folder import RunFolder, number, read_run
from zoo.eval.results import NEUTRAL, SUFFIX, Record, flat, read

TIMED: Mapping[str, tuple[str, int]] = {"speed": ("speed/img_s", 1), "prefill": ("prefill/ms", -1)}
"""Benchmarks whose numbers are never the same twice, with the number that says which measurement is
the fastest, and its sign: that one is shown, as other work on a machine only slows it down."""
IN_TRAINING = "in training"
"""What tells a number that a run logged from one that `zoo eval` measured of the same data."""


class Measure(NamedTuple):
    """The name of a number, the data on which it was measured, and how."""

    name: str
    data: str
    how: str = ""
    """Only what differs between the measurements of this name on this data: k=5, 96 px."""

    def describe(self) -> str:
        """Return the text for the head of a column."""
        return " · ".join(text for text in self if text)


class Value(NamedTuple):
    """A number of one model: over several seeds, their mean and standard deviation."""

    mean: float | None
    deviation: float | None = None
    """The sample's, over n - 1; `None` for one seed."""
    seeds: int = 1
    size: int | None = None
    """Side of the images that the network saw, in pixels."""


@dataclass(kw_only=True)
class Model:
    """What all sources say about one model."""

    name: str
    found: dict[Measure, Value] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """`name` and `parameters`, as far as known."""
    macs: dict[int, float] = field(default_factory=dict)
    """Multiply-adds of one image, by the side of the image."""
    rates: dict[tuple[int, str], float] = field(default_factory=dict)
    """Images per second, by the side of the images and by machine and precision; of several
    measurements the fastest. Rates of two machines are not compared."""
    records: list[Record] = field(default_factory=list)
    run: RunFolder | None = None

    @property
    def values(self) -> dict[Measure, float | None]:
        """The numbers; over several seeds their mean."""
        return {measure: value.mean for measure, value in self.found.items()}

    @property
    def sizes(self) -> list[int]:
        """Sides of the images of all measurements, in pixels."""
        return sorted({value.size for value in self.found.values() if value.size})


class Number(NamedTuple):
    """One number of one source, with what it depends on."""

    model: str
    name: str
    value: float | None
    data: str | None
    """The identity of the data: its hash, or its path."""
    conditions: Mapping[str, str]
    size: int | None
    seed: int
    source: str


def gather(
    sources: Sequence[str | Path], added: Sequence[Added] = ()
) -> tuple[list[Model], list[str]]:
    """Read folders of runs and result files; return the models, and notes on what is not shown.

    The models are in the order of their first mention. A run and the results of its export are one
    model, unless its weights were others. Measurements that differ in data, settings, precision or
    size are columns of their own; over seeds there is a mean and a standard deviation.

    Raises:
        ValueError: a source is neither the folder of a run nor a result file, or there are
            different numbers of one and the same measurement, in one source or in two.
    """
    order, notes, records, runs, pruned = _read_sources(map(Path, sources))
    records = _once(records)
    changed = _with_other_weights([record for _, record in records])
    found = {key: Model(name=key) for key in dict.fromkeys(order)}
    numbers: list[Number] = []
    for source, record in records:
        key = _identity(record.target)
        if key in changed:
            key = f"{key} (weights {str(record.weights_hash)[:6]})"
        model = found.setdefault(key, Model(name=key))
        _add_record(model, record)
        numbers += _numbers_of(key, record, source)
    paths = {str(Path(r.data).resolve()): r.dataset for _, r in records if r.data}
    for folder in pruned:
        key = _identity(str(folder))
        numbers += _numbers_of_pruned(found.setdefault(key, Model(name=key)), folder)
    for source, run in runs:
        key = _identity(str(run.path.parent) if run.path.parent in pruned else source)
        _add_run(found.setdefault(key, Model(name=key)), run)
        numbers += _numbers_of_run(key, run, source, paths)
    for one in added:
        found.setdefault(one.model, Model(name=one.model))
        numbers += _numbers_of_added(one)
    labels = {one.data: one.data for one in added} | _data_labels(records, runs, paths)
    _fill(found, numbers, labels)
    models = [model for model in found.values() if model.records or model.run or model.found]
    _tell_apart(models)
    return models, notes


class _Sources(NamedTuple):
    """What the sources hold, each with the source that it comes from."""

    order: list[str]
    """Models, as they are named first."""
    notes: list[str]
    records: list[tuple[str, Record]]
    runs: list[tuple[str, RunFolder]]
    pruned: list[Path]


def _read_sources(sources: Iterable[Path]) -> _Sources:
    """Read folders of runs and of pruned models, and result files."""
    found = _Sources([], [], [], [], [])
    order, notes, records, runs, pruned = found
    for source in sources:
        if source.suffix == SUFFIX or source.is_file():
            lines = read(source)
            _refuse_other_numbers(source, lines)
            records += [(str(source), record) for record in lines]
            order += [_identity(record.target) for record in lines]
            continue
        order.append(_identity(str(source)))
        if is_pruned(source):
            pruned.append(source)
            source = source / "run"  # of zoo prune --distill
            if not source.is_dir():
                continue
        run = read_run(source)
        runs.append((str(source), run))
        notes += [f"{source}: {note}" for note in run.notes]
    return found


def _refuse_other_numbers(source: Path, lines: Sequence[Record]) -> None:
    """Refuse a file that holds one measurement twice with different numbers."""
    first: dict[tuple[Any, ...], Record] = {}
    for record in lines:
        other = first.setdefault(record.identity, record)
        differing = [n for n, x in record.values.items() if not _same(x, other.values.get(n))]
        if record.benchmark in TIMED or not (differing or len(record.values) < len(other.values)):
            continue
        name = next(iter(differing), record.benchmark)
        raise ValueError(
            f"{source} holds {record.benchmark} of {record.target} twice, measured in one way with "
            f"other numbers: {name} is {other.values.get(name)} on the line of {other.date} and "
            f"{record.values.get(name)} on that of {record.date}. Take one of the lines out."
        )


def _once(records: Sequence[tuple[str, Record]]) -> list[tuple[str, Record]]:
    """Keep one record of each measurement: the last one, and of timings the fastest."""
    kept: dict[tuple[Any, ...], tuple[str, Record]] = {}
    for source, record in records:
        timed = record.benchmark in TIMED
        # other numbers of two sources are refused when all are brought together
        key = _identity(record.target), *record.identity[1:], None if timed else source
        if timed and key in kept and _quickness(kept[key][1]) >= _quickness(record):
            continue
        kept[key] = source, record
    return list(kept.values())


def _quickness(record: Record) -> float:
    name, sign = TIMED[record.benchmark]
    value = record.values.get(name)
    return -math.inf if value is None else sign * value


def _with_other_weights(records: Sequence[Record]) -> set[str]:
    """Return the models that were measured with several weights at one seed and size."""
    hashes: dict[tuple[str, int, int | None], set[str]] = {}
    for r in records:
        if r.weights_hash:
            key = _identity(r.target), r.seed, r.size
            hashes.setdefault(key, set()).add(r.weights_hash)
    return {key[0] for key, found in hashes.items() if len(found) > 1}


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
    known = ("name", "parameters")
    model.about |= {k: v for k in known if (v := record.model.get(k)) is not None}
    macs, size = record.model.get("macs"), record.size
    if size and macs:
        model.macs[size] = macs
    rate = record.values.get("speed/img_s")
    if size and rate:
        where = f"{record.conditions.get('machine') or 'unknown machine'}, {record.precision}"
        model.rates[size, where] = max(rate, model.rates.get((size, where), 0.0))


def _add_run(model: Model, run: RunFolder) -> None:
    model.run = run
    student = run.about.get("student")
    if not isinstance(student, dict):
        return
    known = dict(name=student.get("name"), parameters=number(student.get("params")))
    model.about = {k: v for k, v in known.items() if v is not None} | model.about
    macs, size = number(student.get("macs")), run.config.get("size")
    if macs and isinstance(size, int):
        model.macs.setdefault(size, macs)


def _numbers_of(key: str, record: Record, source: str) -> Iterable[Number]:
    side = BENCHMARKS[record.benchmark].side if record.benchmark in BENCHMARKS else ""
    own = {
        name: value
        for name, value in record.settings.items()
        if name not in NEUTRAL and (name != side or value != record.size)  # said as the size
    }
    conditions = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in flat(own).items()
    }
    for name, value in record.conditions.items():
        if name != "size" and value is not None:
            conditions[name] = str(value)
    shared = (record.dataset, conditions, record.size, record.seed, source)
    return [Number(key, name, value, *shared) for name, value in record.values.items()]


def _numbers_of_run(
    key: str, run: RunFolder, source: str, paths: Mapping[str, str | None]
) -> Iterable[Number]:
    own, size = ("kind", "step", "time"), run.config.get("size")
    shared = (
        _data_of_run(run, paths),
        {"": IN_TRAINING},
        size if isinstance(size, int) else None,
        int(number(run.config.get("seed")) or 0),
        source,
    )
    return [Number(key, n, value, *shared) for n, value in run.ours.items() if n not in own]


def _numbers_of_added(one: Added) -> Iterable[Number]:
    shared: tuple[Any, ...] = (one.data, {}, None, 0, one.source)
    return (Number(one.model, name, value, *shared) for name, value in one.values.items())


def _numbers_of_pruned(model: Model, folder: Path) -> Iterable[Number]:
    """Return what a cut left of the numbers and how far it went; the size goes to the model."""
    about = read_pruned(folder)
    model.about |= dict(name=about["model"], parameters=about["numbers"])
    shared: tuple[Any, ...] = (None, {}, None, 0, str(folder))
    yield Number(
        model.name, "prune/kept", 100 * about["numbers"] / about["before"]["numbers"], *shared
    )
    for score, distance in (about.get("distances") or {}).items():
        yield Number(model.name, f"prune/distance/{score}", distance, *shared)


def _data_of_run(run: RunFolder, paths: Mapping[str, str | None]) -> str:
    data = run.config.get("data")
    if not isinstance(data, str) or not data:
        return "its own images"
    return paths.get(str(Path(data).resolve())) or data


def _data_labels(
    records: Sequence[tuple[str, Record]],
    runs: Sequence[tuple[str, RunFolder]],
    paths: Mapping[str, str | None],
) -> dict[str | None, str]:
    """Return a short name of each data set: the end of its path that no other one has."""
    places: dict[str, str] = {}
    for _, record in records:
        if record.dataset:
            places.setdefault(record.dataset, record.data or record.dataset)
    for _, run in runs:
        data = _data_of_run(run, paths)
        places.setdefault(data, data)
    longest = max((len(Path(place).parts) for place in places.values()), default=1)
    names = dict(places)
    for length in range(1, longest + 1):
        names = {one: "/".join(Path(place).parts[-length:]) for one, place in places.items()}
        if len(set(names.values())) == len(names):
            break
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    names = {one: f"{n} ({one[:6]})" if n in twice else n for one, n in names.items()}
    return {None: "", **names}


def _fill(
    models: Mapping[str, Model], numbers: Sequence[Number], labels: Mapping[str | None, str]
) -> None:
    """Bring the numbers into columns, and those of several seeds to a mean."""
    groups: dict[tuple[str, str | None], list[Number]] = {}
    for one in numbers:
        groups.setdefault((one.name, one.data), []).append(one)
    cells: dict[tuple[str, Measure], dict[int, Number]] = {}
    for (name, data), members in groups.items():
        how = _differences(members)
        for one in members:
            seeds = cells.setdefault((one.model, Measure(name, labels[data], how(one))), {})
            other = seeds.setdefault(one.seed, one)
            if not _same(other.value, one.value):
                raise ValueError(
                    f"{name} of {one.model} was measured twice in one way, as {other.value} in "
                    f"{other.source} and {one.value} in {one.source}; leave one of them out."
                )
    for (key, measure), seeds in cells.items():
        models[key].found[measure] = _value(list(seeds.values()))


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


def _value(members: Sequence[Number]) -> Value:
    known = [one.value for one in members if one.value is not None and math.isfinite(one.value)]
    size = members[0].size
    if len(members) == 1 or not known:
        return Value(members[0].value, size=size)
    spread = statistics.stdev(known) if len(known) > 1 else None
    return Value(statistics.fmean(known), spread, len(known), size)


class _differences:
    """Which conditions differ among the measurements of one number on one data set.

    The size counts only where one model was measured at several: models have sizes of their own.
    """

    def __init__(self, members: Sequence[Number]):
        measured = [one for one in members if "" not in one.conditions]
        names = dict.fromkeys(name for one in measured for name in one.conditions)
        kinds = {n: {one.conditions.get(n) for one in measured} for n in names}
        self.names = [name for name, values in kinds.items() if len(values) > 1]
        sizes: dict[str, set[int | None]] = {}
        for one in members:
            sizes.setdefault(one.model, set()).add(one.size)
        self.sized = any(len(some) > 1 for some in sizes.values())
        self.mixed = len({"" in one.conditions for one in members}) > 1

    def __call__(self, one: Number) -> str:
        """Return what tells this measurement from the others."""
        words = [f"{one.size} px"] if self.sized and one.size else []
        for name in self.names:
            value = one.conditions.get(name, "–")
            words.append(value if name in ("precision", "machine") else f"{name}={value}")
        words += [IN_TRAINING] if self.mixed and "" in one.conditions else []
        return ", ".join(words)


def timed_on(models: Sequence[Model]) -> list[str]:
    """Return where speeds were measured (machine and precision), by falling number of models."""
    counts = Counter(where for m in models for where in {where for _, where in m.rates})
    return [where for where, _ in counts.most_common()]


def headline_columns(models: Sequence[Model]) -> list[tuple[Measure, Benchmark]]:
    """Return the measures that are the headline of a benchmark, in the order of `BENCHMARKS`."""
    known = headlines()
    measures = list(dict.fromkeys(m for model in models for m in model.found))
    return [
        (measure, benchmark)
        for name, benchmark in known.items()
        for measure in measures
        if measure.name == name
    ]
