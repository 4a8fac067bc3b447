"""The runs of the students' experiment: teachers, students, what is measured of them."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.data.plan import mix
from zoo.eval.fidelity import fidelity
from zoo.experiments.bookkeeping import affordable, append_row, device_name, step_ms
from zoo.experiments.imposed import SCALES
from zoo.experiments.labels import LabelsTask, with_classifier
from zoo.experiments.pictures import Collection, PictureFeed, RandomCrop
from zoo.experiments.probes import probe
from zoo.experiments.students.config import StudentsExperiment
from zoo.experiments.teachers import describe_teachers, measure_teachers, read_and_teach
from zoo.features import Batch, Features, match_grid
from zoo.students.build import build_student, student_grids
from zoo.students.student import Student
from zoo.teachers.pretext import Classifier, Gradients, PatchTransformer, PretextTeacher
from zoo.train.config import Every, Optim, Training
from zoo.train.device import autocast
from zoo.train.distill.config import Distill, Losses
from zoo.train.distill.fold import folded
from zoo.train.distill.phi_s import Normalizer, fit
from zoo.train.distill.step import distill_step
from zoo.train.distill.task import terms_of
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

OPTIM = Optim(lr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup=0.1, ema=0.0)
WAYS = ("distilled", "alone")


def networks(config: StudentsExperiment) -> dict[str, tuple[str, nn.Module]]:
    """Build the teachers' networks: label -> (pretext task, network)."""
    if config.tiny:
        small = PatchTransformer(32, 1, 2, 16, size=config.size)
        return {
            "supervised": ("classifier", Classifier(32, widths=(8, 16, 16))),
            "masked": ("autoencoder", small),
            "edges": ("gradients", Gradients(32, widths=(8, 16))),
        }
    return {
        "supervised": ("classifier", Classifier(384, widths=(64, 128, 256), depth=2)),
        "masked": (
            "autoencoder",
            PatchTransformer(192, 6, 3, 8, size=config.size, mlp_ratio=4.0),
        ),
        "edges": ("gradients", Gradients(128, widths=(48, 96))),
    }


@dataclass(frozen=True)
class StudentsSetup:
    """What all students of the students' experiment share."""

    config: StudentsExperiment
    device: torch.device
    collection: Collection
    crop: RandomCrop
    teachers: dict[str, PretextTeacher]
    normalizers: dict[str, dict[str, Normalizer]]
    """Family -> teacher -> PHI-S, on the grid on which the two are compared."""

    def autocast(self) -> AbstractContextManager:
        """Return the context in which models run."""
        return autocast(self.config.precision, self.device)

    def feed(self, seed: int) -> PictureFeed:
        """Return the crops of a seed, which are the same for both ways of learning."""
        return self.collection.feed(self.crop, batch=self.config.batch, seed=mix(seed, 31))


def prepare(config: StudentsExperiment) -> StudentsSetup:
    """Read the pictures, train the teachers, fit PHI-S to each.

    Raises:
        ValueError: the device is not there, or the data has no images or no classes.
    """
    torch.manual_seed(mix(config.teacher_seed, 33))
    taught = read_and_teach(config, networks(config), SCALES, batch=config.batch)
    measure = partial(
        measure_teachers, taught.teachers, taught.collection, taught.crop, batch=config.batch
    )
    moments, normalizers = measure(), {}
    for family, (name, options) in config.chosen.items():
        texts = tuple(f"{key}={value!r}" for key, value in options.items())
        compared = measure(
            grid=student_grids(name, config.size, (config.size,), texts)[config.size]
        )
        normalizers[family] = {label: fit("phi_s", m) for label, m in compared.items()}
    config.out.mkdir(parents=True, exist_ok=True)
    statistics = json.dumps(describe_teachers(taught.teachers, moments), indent=2)
    (config.out / "teachers.json").write_text(statistics + "\n")
    return StudentsSetup(config, *taught, normalizers)


def new_student(setup: StudentsSetup, family: str, seed: int, *, alone: bool) -> Student:
    """Build a backbone, the same for both ways, with heads for the teachers or a classifier."""
    name, options = setup.config.chosen[family]
    widths = {label: (t.summary_dim, t.spatial_dim) for label, t in setup.teachers.items()}
    torch.manual_seed(mix(seed, 32))  # the backbone is drawn before the heads
    options = dict(options, drop_path_rate=0.0)
    size = setup.config.size
    student = build_student(name, {} if alone else widths, size=size, options=options)
    if alone:
        with_classifier(student, setup.collection.classes)
    return student.train().to(setup.device)


class DistilledTask(Task):
    """Learn from all teachers, without labels."""

    def __init__(self, setup: StudentsSetup, student: Student, family: str):
        config = Distill(losses=Losses(summary="cosine", spatial="mse"))
        self.terms = tuple(terms_of(config, student, setup.normalizers[family], {}))
        self.teachers = setup.teachers

    def targets(self, batch: Batch, step: int) -> dict[str, Features]:
        return {label: teacher(batch) for label, teacher in self.teachers.items()}

    def losses(
        self, state: TrainState, batch: Batch, targets: dict[str, Features], step: int
    ) -> dict[str, Loss]:
        return distill_step(batch, state.model, targets, self.terms, lambda _: match_grid)


@dataclass(frozen=True, kw_only=True)
class StudentTraining(Training):
    """The config of one student's training."""

    kind: ClassVar[str] = "experiment"


def train_one(
    student: Student,
    setup: StudentsSetup,
    family: str,
    way: str,
    *,
    seed: int,
    steps: int,
    out: Path,
    title: str,
) -> float:
    """Train a student in one of `WAYS`, and return its milliseconds a step.

    Args:
        out: Folder in which the training's log stays.
    """
    config = StudentTraining(
        steps=steps,
        batch=setup.config.batch,
        seed=seed,
        precision=setup.config.precision,
        optim=OPTIM,
        every=Every(log=max(1, min(50, steps // 3)), checkpoint=steps),
        out=out,
    )
    run = Run.create(config)
    task = LabelsTask() if way == "alone" else DistilledTask(setup, student, family)
    train(task, TrainState.of(student, OPTIM), setup.feed(seed), config, run, title=title)
    shutil.rmtree(out / "checkpoints")
    return step_ms(run)


def run_one(setup: StudentsSetup, family: str, seed: int, way: str, steps: int) -> dict[str, Any]:
    """Train and measure one student of a seed in one of `WAYS`, and return its row."""
    config, title = setup.config, f"{family} {way} seed {seed}"
    student = new_student(setup, family, seed, alone=way == "alone")
    out = config.out / "training" / f"{family}-{way}-{seed}"
    speed = train_one(student, setup, family, way, seed=seed, steps=steps, out=out, title=title)
    student.eval()
    parameters = sum(p.numel() for p in student.backbone.parameters())
    row = dict(family=family, way=way, seed=seed, step_ms=speed, parameters=parameters)
    with setup.autocast():
        row |= probe(student.features, setup.collection, config.size)
    if way == "distilled":
        held = setup.collection.held.batches(config.size, 256)
        row |= dict(fidelity(folded(student, setup.normalizers[family]), setup.teachers, held))
    text = "  ".join(f"{k} {v:.1f}" for k, v in row.items() if k.startswith(("knn", "linear")))
    print(f"{title}: {text}")
    return row


def choose_steps(setup: StudentsSetup, began: float) -> int:
    """Measure a few steps of every student, and return how many fit into `config.seconds`.

    Args:
        began: When the experiment began, by `time.perf_counter`.
    """
    config, total = setup.config, 0.0
    if config.seconds is None:
        return config.steps
    for family in config.chosen:
        for way in WAYS:
            student = new_student(setup, family, 0, alone=way == "alone")
            with tempfile.TemporaryDirectory() as folder:
                total += train_one(
                    student,
                    setup,
                    family,
                    way,
                    seed=0,
                    steps=15,
                    out=Path(folder),
                    title=f"time {family} {way}",
                )
    seconds = total / 1e3 * config.seeds
    spent = time.perf_counter() - began
    return affordable(config.steps, seconds, config.seconds, spent, share=0.8)  # then the probes


def run(config: StudentsExperiment) -> dict[str, Any]:
    """Run the experiment, write its result to `config.out` and return it.

    Raises:
        ValueError: `config.out` exists, or as `prepare`.
        Interrupted: a signal came; the finished students are kept and reported.
    """
    from zoo.experiments.students.result import report

    Run.refuse_existing(config.out)
    began = time.perf_counter()
    setup = prepare(config)
    about: dict[str, Any] = dict(config=asdict(config), teachers_s=time.perf_counter() - began)
    name = device_name(setup.device)
    rows: list[dict[str, Any]] = []
    for row in _teacher_rows(setup):
        rows.append(row)
        append_row(config.out / "rows.jsonl", row)
    try:
        steps = choose_steps(setup, began)
        about |= dict(steps=steps, device=name, pictures=len(setup.collection.train))
        with Interrupt() as interrupt:  # for the probes; the training has one of its own
            for seed in range(config.seeds):  # outermost: the first seed completes the table
                for family in config.chosen:
                    for way in WAYS:
                        rows.append(run_one(setup, family, seed, way, steps))
                        append_row(config.out / "rows.jsonl", rows[-1])
                        if interrupt.signal is not None:
                            raise Interrupted(interrupt.signal, "Stopped between two students.")
    finally:
        about["seconds"] = time.perf_counter() - began
        result = report(rows, about, config.out)
    return result


def _teacher_rows(setup: StudentsSetup) -> Iterator[dict[str, Any]]:
    for label, teacher in setup.teachers.items():
        with setup.autocast():
            values = probe(teacher, setup.collection, setup.config.size)
        count = sum(p.numel() for p in teacher.network.parameters())
        print(f"teacher {label}: " + "  ".join(f"{k} {v:.1f}" for k, v in values.items()))
        yield dict(family="teacher", way=label, seed=0, parameters=count, **values)


def main(config: StudentsExperiment) -> bool:
    """Run the experiment, and return True: it tests no claim."""
    run(config)
    return True


def plan(config: StudentsExperiment) -> None:
    """Print the models and the number of runs; write nothing."""
    from zoo.experiments.tables import print_table

    Run.refuse_existing(config.out)
    body = [
        _plan_row(f"teacher {label} ({task})", network)
        for label, (task, network) in networks(config).items()
    ]
    for family, (name, options) in config.chosen.items():
        student = build_student(name, {}, size=config.size, options=options, device="meta")
        body.append(_plan_row(f"student {family} ({name})", student))
    print_table(f"{config.size} px, batch {config.batch}", ["model", "parameters"], body)
    runs = len(WAYS) * len(config.families) * config.seeds
    print(f"{runs} students of {config.steps} steps. Nothing was written.")


def _plan_row(name: str, model: nn.Module) -> Sequence[str]:
    return [name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"]
