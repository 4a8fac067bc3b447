"""`zoo eval`: measure a run, an exported student, or any registered model, by named benchmarks."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from zoo.commands.distill import held_out, prepare, probe
from zoo.data.sources import Source, eval_batches, open_splits
from zoo.eval.detect.detector import is_detector, load_detector
from zoo.eval.extract import Extracted
from zoo.eval.fidelity import fidelity
from zoo.eval.registry import BENCHMARKS, Parts, Picture, Split, Subject, find, load
from zoo.eval.results import SUFFIX, Record, hash_data, hash_weights, read, write
from zoo.eval.speed.models import cost, surroundings
from zoo.eval.speed.throughput import case_name
from zoo.features import Batch
from zoo.students.export import load_export
from zoo.students.student import Student, build_student
from zoo.teachers.teacher import unknown_name
from zoo.train.run import Run

DEFAULT = ("knn", "linear")
"""What is measured of a model on labelled images, unless --on says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An evaluation, described; `check` says what is wrong with it before any work starts."""

    on: tuple[str, ...] = ()
    """Names of benchmarks; none for a run means fidelity and probes on its own held-out images."""
    data: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Where each benchmark's data is."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of each benchmark; its defaults if not given."""
    features: Path | None = None
    """A folder of `zoo embed`, read instead of images."""
    size: int | None = None
    batch: int = 64
    precision: Literal["float32", "amp"] = "float32"
    seed: int = 0
    workers: int = 0
    out: Path | None = None
    command: str | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_data(words: Sequence[str], on: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Read --data: `PATH` for every benchmark without one of its own, `NAME=PATH` for one.

    Raises:
        ValueError: a name that is no benchmark, or one that is not asked for.
    """
    own: dict[str, list[Path]] = {}
    general: list[Path] = []
    for word in words:
        name, sign, path = word.partition("=")
        if not sign or Path(word).exists() or os.sep in name:
            general.append(Path(word))
            continue
        find([name])
        if name not in on:
            raise ValueError(f"--data {word}: {name} is not among --on {','.join(on)}.")
        own.setdefault(name, []).append(Path(path))
    reading = [name for name in on if BENCHMARKS[name].reads != "nothing"]
    return {name: tuple(own.get(name, general)) for name in reading}


def check(asked: Asked) -> None:
    """Refuse what cannot be measured: unknown benchmarks, missing packages, missing data.

    Raises:
        ValueError: what is wrong, and the next step.
    """
    for name in find(asked.on):
        load(name)
        reads = BENCHMARKS[name].reads
        if asked.features is not None:
            if reads != "features":
                raise ValueError(
                    f"{name} needs the model itself: --features serves knn, linear and fewshot."
                )
            continue
        paths = asked.data.get(name, ())
        if reads != "nothing" and not paths:
            raise ValueError(
                f"{name} needs data. Name labelled images with --data PATH (one sub-folder a "
                f"class, or shards), or --data {name}=PATH for this benchmark alone."
            )
        for path in paths:
            if not path.exists():
                raise ValueError(f"There is no data at {path}, which {name} should read.")


def evaluate(target: str | None, asked: Asked, *, show: bool = True) -> list[Record]:
    """Measure `target` on every benchmark, print a table, and append each result to `asked.out`.

    Raises:
        ValueError: the target is unknown, data is missing, or a benchmark refuses it.
    """
    check(asked)
    folder = Path(target or "")
    is_run = target is not None and is_run_folder(folder)
    records: list[Record] = []
    try:
        if is_run and not asked.on:
            records.append(_measure_run(str(target), folder, asked))
        else:
            on = asked.on or DEFAULT
            asked = replace(asked, on=on, data=asked.data or dict.fromkeys(on, ()))
            check(asked)
            subject = open_subject(str(folder / "export") if is_run else target, asked)
            subject.name = str(target or subject.name)
            records.extend(_measure_all(subject, asked))
    finally:  # what was measured before a benchmark refused is worth seeing
        if show and records:
            Console().print(table_of(records))
            _show_published(records[0])
    return records


def is_run_folder(folder: Path) -> bool:
    """Tell a run from an export or a name."""
    return (folder / "config.json").is_file() and (folder / "export").is_dir()


# ---------------------------------------------------------------- the subject


def open_subject(target: str | None, asked: Asked) -> Subject:
    """Build or load the model under test; only its stored features where those are given.

    Raises:
        ValueError: the target is unknown, or there is none.
    """
    shared: dict[str, Any] = dict(
        device=asked.device, precision=asked.precision, batch=asked.batch, seed=asked.seed
    )
    if asked.features is not None:
        from zoo.commands.embed import about_features, read_features

        about, place = about_features(asked.features), asked.features

        def stored(_: Path) -> tuple[Extracted, Extracted]:
            return read_features(place)

        return Subject(name=target or about["model"]["target"], made=None, read=stored, **shared)
    if target is None:
        raise ValueError("Name what to measure: a run, an export or a registered model.")
    trained = is_detector(Path(target))
    if trained and set(asked.on) != {"detect"}:
        raise ValueError(f"{target} is a trained detector; measure it with --on detect alone.")
    with torch.random.fork_rng(devices=[]):  # weights that are drawn are the same ones again
        torch.manual_seed(asked.seed)
        student = detector_backbone(trained) if trained else open_student(target, asked.size)
    student = student.to(asked.device)

    splits = cache(partial(open_splits, held_out=0.2))  # here: another call may see other files

    def open_part(data: Path, split: Split) -> "_Part":
        return _Part(splits(data)[0 if split == "train" else 1], student, asked)

    return Subject(name=target, made=student, open=open_part, **shared)


def open_student(target: str, size: int | None) -> Student:
    """Open an export's folder, a run's, or a registered model; random weights without a tag.

    Raises:
        ValueError: there is no such thing.
    """
    if is_run_folder(Path(target)):
        target = str(Path(target) / "export")
    if Path(target).is_dir():
        return load_export(Path(target))
    if not timm.is_model(target.partition(".")[0]):
        raise unknown_name(target, timm.list_models(), "run, export or registered model")
    if size is None:
        config = timm.get_pretrained_cfg(target)
        size = config.input_size[-1] if config else 224
    return build_student(target, {}, size=size, pretrained="." in target).eval()


def detector_backbone(folder: Path) -> Student:
    """Give the backbone of a trained detector, as a subject has it.

    Its final norm is not a detector's part, and says nothing here.
    """
    detector = load_detector(folder)
    source = detector.spec.source
    options = {k: v for k, v in source.options.items() if k != "img_size"}
    side = source.options.get("img_size", detector.spec.size)
    student = build_student(source.name, {}, size=side, options=options).eval()
    state = {k.removeprefix("model."): v for k, v in detector.backbone.state_dict().items()}
    student.backbone.load_state_dict(state, strict=False)
    return student


class _Part:
    """One part of labelled images, as `Subject.open` gives it."""

    def __init__(self, source: Source, student: Student, asked: Asked):
        self.source, self.student, self.asked = source, student, asked

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        asked = self.asked
        images = eval_batches(
            self.source, max(self.student.size), asked.batch, workers=asked.workers,
            pin=asked.device.type == "cuda",
        )  # fmt: skip
        total = -(-len(self.source) // asked.batch)
        for some in track(images, "extract", total=total, transient=True):
            yield some.to(asked.device)


# ---------------------------------------------------------------- measuring


def _measure_all(subject: Subject, asked: Asked) -> Iterator[Record]:
    """Run benchmark after benchmark; each result is written before the next one starts."""
    about, about_data = _about(subject, asked), cache(partial(_about_data, asked=asked))
    for name in asked.on:
        run, kind = load(name)
        settings = asked.settings.get(name) or kind()
        reads = BENCHMARKS[name].reads
        paths: Sequence[Path | None] = asked.data.get(name, ())
        if reads == "nothing":
            paths = (None,)
        elif asked.features is not None:
            paths = (asked.features,)
        for path in paths:
            known = about | about_data(path)  # a folder is hashed once for all that read it
            yield _measure_one(name, run, subject, path, settings, known, asked)


def _measure_one(
    name: str, run: Any, subject: Subject, path: Path | None, settings: Any, about: dict,
    asked: Asked,
) -> Record:  # fmt: skip
    began = time.perf_counter()
    torch.manual_seed(asked.seed)
    values: dict[str, float] = {}
    scores: dict[str, Parts] = {}
    pictures: dict[str, Picture] = {}
    for key, found in run(subject, path, settings):
        if isinstance(found, Picture):
            pictures[key] = found
        elif isinstance(found, Parts):
            values[key], scores[key] = found.value, found
        else:
            values[key] = float(found)
    record = Record(
        benchmark=name,
        values=values,
        settings=_plain(settings),
        seconds=round(time.perf_counter() - began, 3),
        kept=scores,
        **about,
    )
    return write(asked.out, record, scores, pictures) if asked.out else record


def _plain(settings: Any) -> dict[str, Any]:
    """Give settings as JSON gives them back: tuples as lists, paths as text."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def _about_data(path: Path | None, asked: Asked) -> dict[str, Any]:
    """Name and hash the images; those that stored features were made of."""
    if path is None:
        return {}
    if asked.features is not None:
        from zoo.commands.embed import about_features

        about = about_features(path)
        return dict(data=about["data"], data_hash=about["data_hash"], features=str(path))
    return dict(data=str(path), data_hash=hash_data(path))


def _about(subject: Subject, asked: Asked) -> dict[str, Any]:
    """Say what a rerun needs to know besides the benchmark."""
    around = surroundings(asked.command)
    keys = ("date", "command", "versions", "machine", "threads")
    about = {key: around[key] for key in keys}
    about |= dict(
        target=subject.name, precision=asked.precision, batch=asked.batch, seed=asked.seed
    )
    if asked.features is not None:
        from zoo.commands.embed import about_features

        stored = about_features(asked.features)
        about |= dict(weights_hash=stored["weights_hash"], model=stored["model"])
        return about | dict(precision=stored["precision"])
    return about | dict(
        weights_hash=hash_weights(subject.student), model=about_model(subject.student)
    )


def about_model(student: Student) -> dict[str, Any]:
    """Give the name, the size, the parameters and the multiply-adds of a backbone."""
    try:
        _, macs = cost(case_name(student), student.size[0])
    except (RuntimeError, NotImplementedError):  # an operator that has no meta form
        macs = None
    parameters = sum(p.numel() for p in student.backbone.parameters())
    return dict(name=student.recipe[0], size=student.size[0], parameters=parameters, macs=macs)


def _measure_run(target: str, folder: Path, asked: Asked) -> Record:
    """Measure a run's student on the run's own held-out images, against its teachers."""
    began, run = time.perf_counter(), Run(folder)
    setting = prepare(run.config())
    student = load_export(run.path / "export", device=setting.device)
    with setting.autocast():
        values = dict(fidelity(student, setting.teachers, held_out(setting)))
    values |= dict(probe(student.look, setting))
    about = _about(Subject(name=target, made=student), asked)
    about["precision"] = setting.config.precision
    data = setting.config.data  # a folder, or the word for the images that ship in wheels
    about |= _about_data(Path(data), asked) if Path(data).exists() else dict(data=data)
    record = Record(
        benchmark="run", values=values, seconds=round(time.perf_counter() - began, 3), **about
    )
    return write(asked.out, record, {}, {}) if asked.out else record


# ---------------------------------------------------------------- showing


def table_of(records: Sequence[Record]) -> Table:
    """Show the numbers of one model."""
    table = Table(title=records[0].target)
    table.add_column("benchmark")
    table.add_column("data", overflow="fold")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for record in records:
        place = Path(record.data).name if record.data else ""
        for number, (name, value) in enumerate(record.values.items()):
            first = (record.benchmark, place) if not number else ("", "")
            table.add_row(*first, name, "-" if value is None else f"{value:,.4f}")
        table.add_section()
    return table


def _show_published(record: Record) -> None:
    from zoo.eval.published import published

    name, size = record.model.get("name"), record.model.get("size")
    for figure in published(str(name), size):
        at = f" at {figure.size} px" if figure.size else ""
        Console().print(
            f"published, not measured here: {name}{at}, {figure.measure}: {figure.value} "
            f"({figure.source})",
            highlight=False,
        )


def show_plan(targets: Sequence[str | None], asked: Asked) -> None:
    """Print what would be measured: no weights are loaded and no image is read.

    Raises:
        ValueError: what an evaluation would be refused for.
    """
    check(asked)
    for target in targets:
        if target is not None and not _is_known(target):
            raise unknown_name(target, timm.list_models(), "run, export or registered model")
    table = Table("target", "benchmark", "data", "settings", title="would measure")
    for target in targets:
        for name in asked.on or (DEFAULT if not is_run_folder(Path(target or "")) else ("run",)):
            paths = ", ".join(map(str, asked.data.get(name, ())))
            told = ""
            if name in BENCHMARKS:
                settings = asked.settings.get(name) or load(name)[1]()
                told = ", ".join(f"{k}={v}" for k, v in _plain(settings).items())
            table.add_row(str(target or asked.features), name, str(asked.features or paths), told)
    Console().print(table)
    print(
        f"on {asked.device}, {asked.precision}, batches of {asked.batch}, seed {asked.seed}; "
        f"results to {asked.out or 'the screen only (--out FILE.jsonl keeps them)'}"
    )


def _is_known(target: str) -> bool:
    return Path(target).exists() or timm.is_model(target.partition(".")[0])


# ---------------------------------------------------------------- comparing


def records_of(side: str, asked: Asked) -> list[Record]:
    """Give one side's results: from its result file (`FILE.jsonl` or `FILE.jsonl:TARGET`), or
    measured now.

    Raises:
        ValueError: the file holds several targets and none was named.
    """
    file, _, wanted = (side, "", "") if Path(side).is_file() else side.rpartition(":")
    if not file or not Path(file).is_file() or Path(file).suffix != SUFFIX:
        return evaluate(side, asked, show=False)
    records = read(Path(file))
    targets = sorted({record.target for record in records})
    if wanted and wanted not in targets:
        raise ValueError(f"{file} has no result of {wanted!r}; it has {', '.join(targets)}.")
    if not wanted and len(targets) > 1:
        raise ValueError(
            f"{file} holds results of {', '.join(targets)}; name one: {file}:{targets[0]}."
        )
    return [record for record in records if record.target == (wanted or targets[0])]


def compare_targets(first: str, second: str, asked: Asked) -> None:
    """Print the differences of two models with paired bootstrap intervals over images.

    Raises:
        ValueError: the two share no benchmark with the same data and settings.
    """
    from zoo.eval.paired import compare

    rows = compare(records_of(first, asked), records_of(second, asked))
    table = Table(title=f"{second} against {first}")
    for column in ("measure", "first", "second", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for row in rows:
        table.add_row(*row.told(), style="bold" if row.separated else None)
    table.caption = "Paired bootstrap over images; what the interval separates from 0 is bold."
    Console().print(table)
