"""Runs the cells as long as there is time, measures each, and keeps its row."""

import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from zoo.data.embedded import embedded_data
from zoo.data.sources import open_labelled
from zoo.experiments.beside import Beside
from zoo.experiments.bookkeeping import append_row, begin_rows, device_name, step_ms
from zoo.experiments.deadline import Deadline
from zoo.experiments.pictures import HELD_OUT, Collection, read_collection, unused_name
from zoo.experiments.probes import probe
from zoo.experiments.real.cells import NOT_TRAINED, SEVERAL, Cell, cells, distillation, options_of
from zoo.experiments.real.config import RealExperiment
from zoo.experiments.real.controls import learn_labels, untrained
from zoo.experiments.real.result import report
from zoo.features import Batch, Features
from zoo.files import written_whole
from zoo.library import distill
from zoo.students.build import build_student, read_options
from zoo.students.export import load_export
from zoo.students.student import Student
from zoo.teachers.open import open_teacher
from zoo.train.device import autocast, device_of, workers_of
from zoo.train.distill.config import Distill
from zoo.train.distill.setup import check_names, open_data
from zoo.train.interrupt import Interrupted
from zoo.train.pretext import pretext_weights
from zoo.train.run import Run

KEPT = (
    "data", "labelled", "teachers", "dense", "students", "resolved", "arms", "scale", "steps",
    "other_steps", "size", "sizes", "batch", "rate", "calibration", "limit", "speed", "precision",
)  # fmt: skip
"""Fields in which a resumed experiment is as it was begun."""
PROBE: dict[str, Any] = dict(strengths=(3.0, 0.3, 0.03, 0.003), max_steps=100)
"""Of the linear probe: a few thousand rows ask for stronger ones than `zoo eval` begins with."""
LEAST_SECONDS = 45.0
"""With less time left no training is begun: opening its networks takes about as long."""


class Bench:
    """Where students are trained and measured: the labelled pictures and the dense teacher."""

    def __init__(self, config: RealExperiment):
        self.config, self.device = config, device_of(config.device)
        self._collections: dict[int, Collection] = {}

    @cached_property
    def folders(self) -> tuple[Path, ...]:
        """The labelled data sets."""
        return labelled_folders(self.config)

    def collection(self, size: int) -> Collection:
        """Return the labelled pictures at a size, decoded when they are first wanted."""
        if size not in self._collections:
            found = read_collection(self.folders, size, self.device, self.config.limit)
            self._collections[size] = found
        return self._collections[size]

    @cached_property
    def dense(self) -> str | None:
        """The dense teacher by name, trained if it was not; its weights stay in the experiment."""
        if self.config.dense == "none":
            return None
        path = self.config.out / f"{self.config.dense}.safetensors"
        if not path.is_file():
            train, *_ = open_data(any_run(self.config))
            weights = pretext_weights(self.config.dense, train, seed=0, device=self.device)
            with written_whole(path) as temporary:  # a torn file would teach all students
                shutil.copyfile(weights, temporary)
        return f"pretext:{self.config.dense}/{path}"

    def run(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """Train a cell, if it is trained, and yield its rows."""
        began = time.perf_counter()
        if cell.arm == "teachers":
            yield from self._teachers(cell)
            return
        row: dict[str, Any] = dict(asdict(cell), key=cell.key)
        if cell.arm == "untrained":
            student, found = untrained(self.config, cell).to(self.device).eval(), {}
        elif cell.arm == "labels":
            student, found = learn_labels(self.config, cell, self.folders), {}
        else:
            student, found = self._distilled(cell)
        if cell.arm not in NOT_TRAINED:
            folder = self.config.place / cell.key
            found |= dict(steps=self.config.steps_of(cell.student), step_ms=step_ms(Run(folder)))
        found["values"] = self.measure(student.features, self.config.size)
        if cell.student == self.config.resolved and cell.arm in ("phi_s", SEVERAL):
            found["by_size"] = self._by_size(student, found["values"])
        parameters = sum(p.numel() for p in student.backbone.parameters())
        seconds = time.perf_counter() - began
        yield dict(row, parameters=parameters, seconds=seconds, **found)

    def forget(self) -> None:
        """Free what the last cell has compiled and recorded: there may be thirty of them."""
        if self.device.type == "cuda":
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()

    def _distilled(self, cell: Cell) -> tuple[Student, dict[str, Any]]:
        run = distillation(self.config, cell, self.dense)
        begun = (run.out / "config.json").is_file()
        distill(resume=run.out) if begun else distill(run)
        lines = (run.out / "metrics.jsonl").read_text().splitlines()
        last = [
            found
            for found in map(json.loads, lines)
            if found["kind"] == "eval" and found["arm"] == "student" and found["step"] == run.steps
        ][-1]
        close = {k: v for k, v in last.items() if k.startswith(("fidelity", "cosine"))}
        student = load_export(run.out / "export", device=self.device)
        return student, dict(fidelity=close, weights=last.get("weights"))

    def _by_size(self, student: Student, known: Mapping[str, float]) -> dict[str, Any]:
        found = {}
        for size in self.config.sizes:

            def features(batch: Batch, size: int = size) -> Features:
                return student.features(batch, (size, size))

            own = size == self.config.size
            found[str(size)] = dict(known) if own else self.measure(features, size)
        return found

    def measure(self, features: Callable[[Batch], Features], size: int) -> dict[str, float]:
        """Return kNN and linear probe on every labelled data set, in per cent."""
        with autocast(self.config.precision, self.device), torch.no_grad():
            return probe(features, self.collection(size), size, fit=PROBE)

    def _teachers(self, cell: Cell) -> Iterator[dict[str, Any]]:
        for name in (*self.config.teachers, *([self.dense] if self.dense else [])):
            began = time.perf_counter()
            teacher: Any = open_teacher(name, device=self.device)
            size = max(teacher.size)
            values = self.measure(teacher, size)
            network = getattr(teacher, "network", None)
            count = sum(p.numel() for p in network.parameters()) if network else 0
            short = name.partition(":")[2].split("/")[0]
            seconds = time.perf_counter() - began
            yield dict(student=short, arm="teacher", seed=0, key=f"teacher-{short}", size=size,
                       parameters=count, values=values, seconds=seconds)  # fmt: skip
        yield dict(asdict(cell), key=cell.key, seconds=0.0)  # all of them are there


def labelled_folders(config: RealExperiment) -> tuple[Path, ...]:
    """Return the labelled data sets; scikit-learn's digits in a test run that names none."""
    if config.labelled or not config.tiny:
        return config.labelled
    return (embedded_data() / "digits",)


def any_run(config: RealExperiment) -> Distill:
    """Return a run of the experiment; all have the same images to learn from."""
    return distillation(config, Cell(config.students[0], "phi_s"), None)


def check(config: RealExperiment) -> dict[str, Any]:
    """Refuse what cannot be trained or measured, before any work.

    Returns:
        What the data are: images to learn from, pictures and classes of each labelled data set.

    Raises:
        ValueError: data are not named or there, have no classes, or a model is not known.
    """
    if not config.data:
        raise ValueError("There are no photographs to learn from; name them with --data FOLDER.")
    folders = labelled_folders(config)
    if not folders:
        raise ValueError(
            "There is nothing to measure on; name data with classes with --labelled FOLDER FOLDER."
        )
    for cell in cells(config):
        if cell.arm in ("phi_s", SEVERAL):
            check_names(distillation(config, cell, None))
    for name in config.teachers:
        open_teacher(name)  # its weights are there
    train, *_ = open_data(any_run(config))
    sets = {}
    for folder in folders:
        bank, queries = open_labelled(folder, HELD_OUT)
        if not bank.classes:
            raise ValueError(
                f"{folder} has no classes: one sub-folder a class, or .cls files in the shards."
            )
        sets[unused_name(folder.resolve().name, sets)] = dict(
            classes=len(bank.classes),
            bank=min(len(bank), config.limit or len(bank)),
            tested=min(len(queries), config.limit or len(queries)),
        )
    return dict(images=len(train), labelled=sets)


def main(config: RealExperiment) -> bool:
    """Run the experiment; return whether no cell failed, as it tests no claim.

    Raises:
        ValueError: as `check`; or the folder was begun with other settings.
        Interrupted: a signal came; the training is saved, and what is there is reported.
    """
    kept = json.loads(json.dumps({n: getattr(config, n) for n in KEPT}, default=str))
    data = check(config)
    rows = begin_rows(config.out, resume=config.resume, same=kept)
    about: dict[str, Any] = dict(
        config=kept, data=data, device=device_name(device_of(config.device)),
        torch=torch.__version__,
    )  # fmt: skip
    Run(config.out).write_json("about.json", about)
    failed = about["failed"] = dict[str, str]()
    try:
        _run_cells(config, rows, failed)
    finally:
        if rows:
            done = {row["key"] for row in rows}
            about["left"] = [cell.key for cell in cells(config) if cell.key not in done]
            report(rows, about, config.out)
            more = ": --resume goes on" if about["left"] else ""
            print(f"{len(about['left'])} cells are left{more}")
    return not failed


def _run_cells(config: RealExperiment, rows: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """Run what has no row yet; `failed` takes the cells that fail, and why."""
    done = {row["key"] for row in rows}
    missing = [cell for cell in cells(config) if cell.key not in done]
    ended = _side_by_side if config.jobs > 1 else _one_by_one
    deadline = Deadline(config.seconds, least=LEAST_SECONDS)
    with ExitStack() as stack:
        if config.jobs == 1:  # of several, each process has its own
            stack.enter_context(deadline.stopping())
            stack.enter_context(deadline)
        for cell, found in ended(config, missing, deadline):
            if isinstance(found, BaseException):
                failed[cell.key] = (str(found).splitlines() or [type(found).__name__])[0]
                print(f"FAILED {cell.key}: {failed[cell.key]}", flush=True)
                continue
            for row in found:
                if row["key"] not in done:
                    _keep(config, rows, row)
            for name in ("checkpoints", "export"):  # only now: a kill would lose the training
                shutil.rmtree(config.place / cell.key / name, ignore_errors=True)


Ended = Iterator[tuple[Cell, list[dict[str, Any]] | BaseException]]
"""A cell that has ended, with its rows or its error."""


def _one_by_one(config: RealExperiment, missing: Sequence[Cell], deadline: Deadline) -> Ended:
    bench = Bench(config)
    for cell in missing:
        if not deadline.allows():
            print(f"no time to begin {cell.key}")
            return
        found: list[dict[str, Any]] | BaseException
        try:
            found = list(bench.run(cell))
        except Interrupted:
            raise
        except Exception as error:  # a loss that is not finite: the other cells still count
            traceback.print_exc()
            found = error
        yield cell, found
        bench.forget()


def _side_by_side(config: RealExperiment, missing: Sequence[Cell], deadline: Deadline) -> Ended:
    """Run cells in `--jobs` processes; the dense teacher is trained first, as all learn from it.

    At the deadline the processes save what they learn; this one waits for them.
    """
    if missing:
        Bench(config).dense  # noqa: B018
    device = device_of(config.device)
    each = max(1, workers_of("auto", device) // config.jobs) if device.type == "cuda" else 0
    shared = replace(config, workers=each) if config.workers == "auto" else config
    with Beside(config.jobs, worker, (shared,), config.out / "workers") as beside:
        yield from beside.run(missing, deadline)


def worker(config: RealExperiment) -> Callable[[Cell], list[dict[str, Any]]]:
    """Return what carries out a cell in a process of its own: from a cell to its rows."""
    bench = Bench(config)

    def run(cell: Cell) -> list[dict[str, Any]]:
        try:
            return list(bench.run(cell))
        except Exception:
            traceback.print_exc()  # into the worker's file
            raise
        finally:
            bench.forget()

    return run


def _keep(config: RealExperiment, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    append_row(config.out / "rows.jsonl", row)
    found = "  ".join(f"{k} {v:.1f}" for k, v in row.get("values", {}).items())
    print(f"{row['key']}: {found}  ({row['seconds']:.0f} s)", flush=True)


def plan(config: RealExperiment) -> None:
    """Print the models, the data and the cells in their order; write nothing."""
    if not config.resume:
        Run.refuse_existing(config.out)
    data = check(config)
    print(f"{data['images']:,} images to learn from, batches of {config.batch}, {config.size} px")
    for name, found in data["labelled"].items():
        print(f"{name}: {found['classes']} classes, {found['bank']:,} to fit, "
              f"{found['tested']:,} to test")  # fmt: skip
    print("teachers: " + ", ".join((*config.teachers, *_dense_words(config))))
    for student in config.students:
        texts: Sequence[str] = options_of(student) if student == config.resolved else ()
        made = build_student(
            student, {}, size=config.size, options=read_options(texts), device="meta"
        )
        count = sum(p.numel() for p in made.parameters())
        print(f"student {student}: {count / 1e6:.2f} M parameters")
    for number, cell in enumerate(cells(config), 1):
        steps = config.steps_of(cell.student) if cell.arm not in NOT_TRAINED else 0
        print(f"{number}. {cell.key}" + (f": {steps:,} steps" if steps else ""))
    print("Nothing was written.")


def _dense_words(config: RealExperiment) -> tuple[str, ...]:
    return () if config.dense == "none" else (f"pretext:{config.dense}, trained here",)
