"""Measure a run, an exported student, or any registered model, by named benchmarks."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from zoo.commands.distill.run import held_out, probe
from zoo.commands.evaluate.failures import Failures, NotWritten
from zoo.commands.evaluate.subject import Measured, open_measured, refuse_other_kind
from zoo.data.names import is_stream
from zoo.eval.benchmarks import (
    BENCHMARKS,
    DEFAULT,
    checked_settings,
    find,
    kind_of,
    load,
    settings_of,
)
from zoo.eval.detect.detector import is_detector, load_detector
from zoo.eval.examples import Example
from zoo.eval.fidelity import fidelity
from zoo.eval.language.subject import TextSubject, about_text_model
from zoo.eval.multimodal.subject import ImageTextSubject, about_image_text_model
from zoo.eval.registry import Found, Parts, Picture, Subject
from zoo.eval.results import (
    TRAINED,
    Record,
    check_out,
    files_of,
    finished,
    finite,
    hash_data,
    hash_weights,
    work_of,
    write,
)
from zoo.eval.speed.environment import environment
from zoo.eval.subject import EvalRequest, about_model, is_run_folder
from zoo.files import near
from zoo.students.export import load_export
from zoo.train.distill.config import Distill
from zoo.train.distill.fold import with_probabilities
from zoo.train.distill.setup import prepare
from zoo.train.fields import changed
from zoo.train.mesh import MORE_PATIENCE, by_first, is_first, union, world
from zoo.train.run import Run
from zoo.train.trackers import check_trackers, open_trackers

LOSSES = "metrics.jsonl"
"""What a training has logged; it stays beside the result."""


def read_data(words: Sequence[str], on: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Read --data: `PATH` for every benchmark without one of its own, `NAME=PATH` for one.

    Raises:
        ValueError: a name that is no benchmark, or one that is not among `on`.
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


def check(request: EvalRequest) -> None:
    """Refuse what cannot be measured: unknown benchmarks, missing packages, missing data.

    Raises:
        ValueError: what is wrong, and the next step.
    """
    check_trackers(request.track)
    if request.resume and request.out is None:
        raise ValueError("--resume needs the --out of the evaluation that was stopped.")
    if request.out is not None:
        check_out(request.out)
    kind = kind_of(find(request.on))
    reads_text = kind != "vision"
    if request.on and ((reads_text and request.size) or (not reads_text and request.tokenizer)):
        option, of = ("--size", "images") if reads_text else ("--tokenizer", "text")
        raise ValueError(f"{option} is of {of}, which {', '.join(request.on)} do not read.")
    for name in find(request.on):
        load(name)
        reads = BENCHMARKS[name].reads
        if request.features is not None:
            if reads != "features":
                raise ValueError(
                    f"{name} needs the model itself: --features serves knn, linear and fewshot."
                )
            continue
        paths = request.data.get(name, ())
        if reads != "nothing" and not paths:
            what = "labelled images with --data PATH (one sub-folder a class, or shards)"
            what = "a text (.txt, .jsonl) or tasks with --data PATH" if kind == "language" else what
            if kind == "multimodal":
                what = "questions about images with --data PATH (LLaVA's JSON, shards, easy-VQA)"
            raise ValueError(
                f"{name} needs data. Name {what}, or --data {name}=PATH for this benchmark alone."
            )
        for path in paths:
            if not path.exists():
                drawn = name == "vqa" and path.name.startswith("generated:")
                hint = " Pictures are drawn by --on sight." if drawn else near(path)
                raise ValueError(f"There is no data at {path}, which {name} should read.{hint}")


def completed(target: str | None, request: EvalRequest) -> EvalRequest:
    """Return a request that is checked, with the benchmarks that its target is measured on.

    A run that is to be compared with its teachers has none.

    Raises:
        ValueError: as `check`, or the target is of another kind.
    """
    refuse_other_kind(target, request)
    check(request)
    if request.on or (target is not None and is_run_folder(Path(target))):
        return request
    request = replace(request, on=DEFAULT, data=request.data or dict.fromkeys(DEFAULT, ()))
    check(request)
    return request


def evaluate(target: str | None, request: EvalRequest, *, show: bool = True) -> list[Record]:
    """Measure `target` on every benchmark, print a table, and append each result to `request.out`.

    On several ranks rank 0 computes, writes and returns the results; the others lend a hand.

    Raises:
        ValueError: the target is unknown, data is missing, or a benchmark refuses it.
        Unfinished: some of several measurements failed; the others were made.
    """
    request = completed(target, request)
    records: list[Record] = []
    try:
        if not request.on:
            records.extend(_measure_run(str(target), Path(str(target)), request))
        else:
            subject = open_measured(target, request)
            records.extend(_measure_all(subject, request))
    finally:  # what was measured before a benchmark refused is worth seeing
        if show and records:
            Console().print(table_of(records))
            _show_published(records[0])
    return records


def call(
    target: str | Path | None,
    on: str | Sequence[str],
    data: str | Path | Sequence[str | Path] | Mapping[str, Any] | None,
    show: bool,
    fields: Mapping[str, Any],
) -> list[Record]:
    """Carry out `zoo.evaluate`, whose docstring says what it takes."""
    names = find([name.strip() for name in on.split(",")] if isinstance(on, str) and on else [*on])
    plain = {name: value for name, value in fields.items() if name not in BENCHMARKS}
    if not names and (data is not None or "features" in plain):
        names = list(DEFAULT)
    own = {name: fields[name] for name in BENCHMARKS if name in fields}
    unused = [name for name in own if name not in names]
    if unused:
        raise ValueError(f"There are settings for {', '.join(unused)}, but on={names} lacks it.")
    request = EvalRequest(
        on=tuple(names),
        data=_paths(data, names),
        settings={name: changed(settings_of(name)(), value) for name, value in own.items()},
        command=f"zoo.evaluate({str(target)!r}, on={names!r}, data={data!r})",
    )
    target = None if target is None else str(target)
    return evaluate(target, changed(request, plain), show=show)


def _paths(
    data: str | Path | Sequence[str | Path] | Mapping[str, Any] | None, on: Sequence[str]
) -> dict[str, tuple[Path, ...]]:
    """Bring every way to name images into one: benchmark -> paths."""
    if isinstance(data, Mapping):
        given = find([*data])
        wrong = [name for name in given if name not in on]
        if wrong:
            raise ValueError(f"There is data for {', '.join(wrong)}, but on={list(on)} lacks it.")
        return {name: _paths(data[name], [name]).get(name, ()) for name in given}
    paths = () if data is None else (data,) if isinstance(data, str | Path) else data
    reading = [name for name in on if BENCHMARKS[name].reads != "nothing"]
    return {name: tuple(map(Path, paths)) for name in reading}


# ---------------------------------------------------------------- measuring


def _measure_all(subject: Measured, request: EvalRequest) -> Iterator[Record]:
    """Run benchmark after benchmark; each result is written before the next one starts.

    Raises:
        ValueError: what a benchmark would refuse, before the first of them.
        Unfinished: after the last, if some of several failed; they were named when they did.
    """
    settings = {name: request.settings.get(name) or settings_of(name)() for name in request.on}
    used: dict[str, dict[str, Any]] = {}
    for name in request.on:  # every check comes before any work
        found = checked_settings(name, subject, request.data.get(name, ()), settings[name])
        used[name] = plain(found)
        settings[name] = settings[name] if isinstance(found, Mapping) else found
    about = by_first(partial(_about, subject, request))
    about_data = cache(lambda path: by_first(partial(_about_data, path, request)))
    about_size = cache(lambda side: by_first(partial(_about_size, subject, about, side)))

    def begun(name: str, path: Path | None) -> Record:
        side = (used[name] | used[name].get(TRAINED, {})).get(BENCHMARKS[name].side)
        known = about | about_data(path)  # a folder is hashed once for all that read it
        known |= about_size(side)
        known["protocol"] = request.protocols.get(name)
        return Record(benchmark=name, values={}, settings=used[name], **known)

    todo = [(begun(name, path), path) for name in request.on for path in _read_by(name, request)]
    if request.out and not request.resume:
        for record, _ in todo:
            by_first(partial(_refuse_work, work_of(request.out, record)))
    # ranks that have not failed alike would wait for each other: there an error ends all
    failures, made = Failures(len(todo) if world() == 1 else 1, "measurements"), list[Record]()
    for record, path in todo:
        name, on = record.benchmark, f" on {path}" if path else ""
        run = partial(load(name)[0], subject, path, settings[name])
        with failures.noted(f"{name} of {subject.name}{on}"):
            known = by_first(partial(_known, record, subject, request))
            made.append(known or _measure_one(record, subject, path, run, request))
            if is_first():
                yield made[-1]
    failures.tell(made)


def _read_by(name: str, request: EvalRequest) -> Sequence[Path | None]:
    """Return the data that a benchmark is measured on, one measurement each."""
    if BENCHMARKS[name].reads == "nothing":
        return (None,)
    return (request.features,) if request.features else request.data.get(name, ())


def _about_size(subject: Measured, about: Mapping[str, Any], side: int | None) -> dict[str, Any]:
    """Describe the model at the size at which a benchmark sees the images."""
    if side is None or not isinstance(subject, Subject) or subject.made is None:
        return {}
    return dict(model=about["model"] | about_model(subject.student, side))


def _known(record: Record, subject: Measured, request: EvalRequest) -> Record | None:
    """Return what an evaluation that was stopped has left of a measurement, if it may be taken."""
    if not request.out:
        return None
    if request.resume and (found := finished(request.out, record)):
        print(f"{record.benchmark} of {record.target}: {request.out} has it already.")
        return found
    subject.work = work_of(request.out, record)
    return None


def _measure_one(
    record: Record,
    subject: Measured,
    path: Path | None,
    run: Callable[[], Iterator[Found]],
    request: EvalRequest,
) -> Record:
    """Carry out one benchmark and keep its result; every rank calls this, and rank 0 has it."""
    began, benchmark = time.perf_counter(), BENCHMARKS[record.benchmark]
    torch.manual_seed(request.seed)
    subject.unreadable.clear()
    found: list[Found] = []
    if benchmark.spread:
        found.extend(run())
    else:
        if benchmark.reads == "features" and path is not None and isinstance(subject, Subject):
            subject.share(path)
        by_first(lambda: found.extend(run()), patience=MORE_PATIENCE)
    results: list[Record] = [record]
    by_first(lambda: results.append(_kept(record, subject, found, began, request)))
    return results[-1]


def _kept(
    record: Record, subject: Measured, found: Sequence[Found], began: float, request: EvalRequest
) -> Record:
    """Write the result of a benchmark, and remove what its training has left."""
    values: dict[str, float] = {}
    scores: dict[str, Parts] = {}
    pictures: dict[str, Picture] = {}
    examples: list[Example] = []
    for key, value in found:
        if isinstance(value, Picture):
            pictures[key] = value
        elif isinstance(value, Example):
            examples.append(value)
        elif isinstance(value, Parts):
            values[key], scores[key] = value.value, value
        else:
            values[key] = float(value)
    seconds = round(time.perf_counter() - began, 3)
    lost = len(subject.unreadable)
    record = replace(record, values=values, seconds=seconds, kept=scores, unreadable=lost)
    written = kept(record, request, scores, pictures, examples)
    if subject.work and subject.work.exists():
        if request.out and (losses := subject.work / LOSSES).is_file():
            files_of(request.out).mkdir(exist_ok=True)
            shutil.copyfile(losses, files_of(request.out) / f"{subject.work.name}-losses.jsonl")
        shutil.rmtree(subject.work)
        if not any(subject.work.parent.iterdir()):
            subject.work.parent.rmdir()
    return written


def _refuse_work(work: Path) -> None:
    if work.exists():
        raise ValueError(
            f"A training for this measurement was stopped in {work}. Go on with it by --resume, "
            "or remove that folder."
        )


def plain(settings: Any) -> dict[str, Any]:
    """Return settings as JSON gives them back: tuples as lists, paths as text."""
    own = settings if isinstance(settings, Mapping) else dataclasses.asdict(settings)
    return json.loads(json.dumps(own, default=str))


def _about_data(path: Path | None, request: EvalRequest) -> dict[str, Any]:
    """Name and hash the images; those that stored features were made of."""
    if path is None:
        return {}
    if request.features is not None:
        from zoo.eval.stored import about_features

        about = about_features(path)
        return dict(data=about["data"], data_hash=about["data_hash"], features=str(path))
    return dict(data=str(path), data_hash=hash_data(path))


def _about(subject: Measured, request: EvalRequest) -> dict[str, Any]:
    """Say what a rerun needs to know besides the benchmark."""
    around = environment(request.command)
    keys = ("date", "command", "versions", "machine", "threads", "load")
    about = {key: around[key] for key in keys}
    about |= dict(
        target=subject.name, precision=request.precision, batch=request.batch, seed=request.seed
    )
    if isinstance(subject, ImageTextSubject):
        hashed = hash_weights(subject.model)
        return about | dict(weights_hash=hashed, model=about_image_text_model(subject))
    if isinstance(subject, TextSubject):
        hashed = hash_weights(subject.model)
        return about | dict(weights_hash=hashed, model=about_text_model(subject))
    if request.features is not None:
        from zoo.eval.stored import about_features

        stored = about_features(request.features)
        about |= dict(weights_hash=stored["weights_hash"], model=stored["model"])
        return about | dict(precision=stored["precision"])
    trained = is_detector(Path(subject.name))
    whole = load_detector(trained) if trained else subject.student  # a detector has heads too
    return about | dict(weights_hash=hash_weights(whole), model=about_model(subject.student))


def _measure_run(target: str, folder: Path, request: EvalRequest) -> list[Record]:
    """Measure a run's student on the run's own held-out images, against its teachers.

    Every rank calls this; rank 0 returns the result.
    """
    began, run = time.perf_counter(), Run(folder)
    config = run.config(Distill)
    if is_stream(config.data):  # another's run would choose a command that is run here
        raise ValueError(
            f"The run in {folder} has learnt from {config.data}, which is not opened again. "
            f"Evaluate its export: zoo eval {folder / 'export'} --data PATH."
        )
    setting = prepare(config)
    student = load_export(run.path / "export", device=setting.device)
    with setting.autocast():
        shown = with_probabilities(student, setting.config.summary_losses)
        values = dict(fidelity(shown, setting.teachers, held_out(setting)))
    values |= dict(probe(student.features, setting))
    union(setting.unreadable)
    if not is_first():
        return []
    about = _about(Subject(name=target, made=student), request)
    about["precision"] = setting.config.precision
    data = setting.config.data  # a folder, or the word for the images that ship in wheels
    about |= _about_data(Path(data), request) if Path(data).exists() else dict(data=data)
    record = Record(
        benchmark="run",
        values=values,
        unreadable=len(setting.unreadable),
        seconds=round(time.perf_counter() - began, 3),
        **about,
    )
    return [kept(record, request, {}, {})]


def kept(
    record: Record,
    request: EvalRequest,
    scores: Mapping[str, Parts],
    pictures: Mapping[str, Picture],
    examples: Sequence[Example] = (),
) -> Record:
    """Append a result to the file of the request, if it has one; print it if that fails.

    Raises:
        NotWritten: the file cannot be written any more.
    """
    _tell_trackers(record, request)
    if not request.out:
        return record
    try:
        return write(request.out, record, scores, pictures, examples)
    except OSError as error:
        Console().print(table_of([record]))
        told = f"The result above was not written to {request.out}: {error}."
        raise NotWritten(told) from error


def _tell_trackers(record: Record, request: EvalRequest) -> None:
    """Tell the trackers one result; each benchmark is a run of its own there."""
    if not request.track:
        return
    out = request.out or Path("evaluation.jsonl")
    folder = files_of(out) / f"{Path(record.target).name}-{record.benchmark}"
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(target=record.target, data=record.data, seed=record.seed, size=record.size)
    about |= {f"{record.benchmark}.{name}": x for name, x in record.settings.items()}
    known = {name: x for name, value in record.values.items() if (x := finite(value)) is not None}
    for tracker in open_trackers(folder, request.track, about, board=False):
        tracker.log(known, 0)
        tracker.close()


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
        if record.unreadable:
            table.add_row("", "", "unreadable images, left out", str(record.unreadable))
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
