"""`zoo experiment students`: a student of each family, against its teachers and itself alone.

Three teachers with three objectives are trained on your pictures. Each family's student learns
from all three, without labels. The same backbone also learns from the labels alone, with the same
initial weights, the same crops and as many steps. The decoded pictures stay on the device: `zoo
distill`, which decodes each image each time, would mostly wait for images here.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.data.plan import mix
from zoo.eval.fidelity import fidelity
from zoo.experiments.bookkeeping import affordable, append_row, device_name
from zoo.experiments.pictures import Collection, RandomCrop, Stream, read_collection, side_for
from zoo.experiments.probes import probe
from zoo.experiments.teachers import describe_teachers, measure_teachers, train_teacher
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.student import Student
from zoo.teachers.name import unknown_name
from zoo.teachers.pretext import Classifier, Gradients, PatchTransformer, PretextTeacher
from zoo.train.config import Optim
from zoo.train.device import autocast, device_of
from zoo.train.distill.fold import folded
from zoo.train.distill.losses import SPATIAL_LOSSES
from zoo.train.distill.phi_s import Normalizer, fit
from zoo.train.distill.step import distill_step
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.optim import build_optimizer, learning_rate
from zoo.train.progress import Progress
from zoo.train.run import Run

Family = tuple[str, dict[str, Any]]
"""A registered model, and keywords that make it small."""

FAMILIES: dict[str, Family] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "fastervit": ("fastervit_0", dict(dim=24, depths=(2, 3, 6, 5))),
    "mambavision": ("mambavision_t", dict(dim=32)),
    "eradio": ("eradio_xxxtiny", dict(dim=24, num_heads=(4, 8))),
}
"""The students of the families, of 5.0 to 5.8 M parameters each."""

TINY_FAMILIES: dict[str, Family] = {
    "vit": ("vit_tiny_patch16_224", dict(depth=2, embed_dim=32, num_heads=2)),
    "fastervit": (
        "fastervit_0", dict(dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2), stem_dim=8)
    ),
    "mambavision": (
        "mambavision_t", dict(dim=8, depths=(1, 1, 2, 2), num_heads=(2, 2, 2, 2), stem_dim=8)
    ),
    "eradio": ("eradio_nano", {}),
}  # fmt: skip
"""The students of a test run on a laptop: of different sizes, and too small to learn much."""

OPTIM = Optim(lr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup=0.1, ema=0.0)
WAYS = ("distilled", "alone")


@dataclass(frozen=True, kw_only=True)
class StudentsExperiment:
    """The students' experiment: its data, sizes and device."""

    data: tuple[Path, ...] = ()
    """Labelled image folders, shards or .npz; by default the digits and photographs that ship
    with scikit-learn and scikit-image."""
    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: int = 3
    steps: int = 500
    batch: int = 256
    size: int = 96
    """Side of the images in pixels."""
    teacher_steps: int = 1200
    teacher_seed: int = 0
    limit: int | None = None
    """Most pictures of each split of each data set."""
    seconds: float | None = None
    """Seconds for the whole experiment: if --steps would take longer, fewer are trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    out: Path = Path("runs/students")
    tiny: bool = False
    """Use the smallest networks and numbers: a test run of under a minute on a CPU."""
    dry_run: bool = False
    """Print the models, and exit."""

    def __post_init__(self):
        for name in ("seeds", "steps", "batch", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.size % 32:
            raise ValueError(f"size is {self.size}; it must be a multiple of the stride 32.")
        for family in self.families:
            if family not in FAMILIES:
                raise unknown_name(family, list(FAMILIES), "family")

    @property
    def chosen(self) -> dict[str, Family]:
        """The students of the chosen families, full or tiny."""
        table = TINY_FAMILIES if self.tiny else FAMILIES
        return {family: table[family] for family in self.families}


def full() -> StudentsExperiment:
    """Return the experiment in full."""
    return StudentsExperiment()


def tiny() -> StudentsExperiment:
    """Return the same experiment at its smallest."""
    return StudentsExperiment(
        seeds=2, steps=8, batch=16, size=64, teacher_steps=8, limit=64, tiny=True
    )


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
    normalizers: dict[str, Normalizer]

    def autocast(self) -> AbstractContextManager:
        """Return the context in which models run."""
        return autocast(self.config.precision, self.device)

    def stream(self, seed: int, steps: int) -> Stream:
        """Return the crops of a seed, which are the same for both ways of learning."""
        sizes = dict(batch=self.config.batch, steps=steps)
        return Stream(self.collection.train, self.crop, seed=mix(seed, 31), **sizes)


def prepare(config: StudentsExperiment) -> StudentsSetup:
    """Read the pictures, train the teachers, fit PHI-S to each.

    Raises:
        ValueError: the device is not there, or the data has no images or no classes.
    """
    device = device_of(config.device)
    flip = 0.5 if config.data else 0.0  # the default data has digits, which are not mirrored
    crop = RandomCrop(size=config.size, flip=flip)
    collection = read_collection(config.data, side_for(config.size), device, config.limit)
    print(f"{len(collection.train)} pictures to train on, {len(collection.held)} held out")
    teachers = {}
    torch.manual_seed(mix(config.teacher_seed, 33))
    for label, (task, network) in networks(config).items():
        teachers[label] = train_teacher(
            task,
            network,
            collection,
            crop,
            steps=config.teacher_steps,
            batch=config.batch,
            seed=config.teacher_seed,
            autocast=lambda: autocast(config.precision, device),
        )
    moments = measure_teachers(teachers, collection, crop, batch=config.batch)
    normalizers = {name: fit("phi_s", m) for name, m in moments.items()}
    config.out.mkdir(parents=True, exist_ok=True)
    statistics = json.dumps(describe_teachers(teachers, moments), indent=2)
    (config.out / "teachers.json").write_text(statistics + "\n")
    return StudentsSetup(config, device, collection, crop, teachers, normalizers)


def new_student(setting: StudentsSetup, family: str, seed: int, *, alone: bool) -> Student:
    """Build a backbone, the same for both ways, with heads for the teachers or a classifier."""
    name, options = setting.config.chosen[family]
    widths = {label: (t.summary_dim, t.spatial_dim) for label, t in setting.teachers.items()}
    torch.manual_seed(mix(seed, 32))  # the backbone is drawn before the heads
    options = dict(options, drop_path_rate=0.0)
    size = setting.config.size
    student = build_student(name, {} if alone else widths, size=size, options=options)
    if alone:
        summary, _ = student.eval().features(Batch(torch.zeros(1, 3, *student.size)))
        assert summary is not None
        student.classifier = nn.Linear(summary.shape[-1], setting.collection.classes)
    return student.train().to(setting.device)


def loss_of(
    student: Student, setting: StudentsSetup, *, alone: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what is minimised: the labels' cross-entropy, or the distance to all teachers."""

    def supervised(images: Tensor, labels: Tensor) -> Tensor:
        logits = cast(nn.Linear, student.classifier)(student.features(Batch(images)).summary)
        return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)

    def distilled(images: Tensor, labels: Tensor) -> Tensor:
        losses = distill_step(
            Batch(images), student, setting.teachers, setting.normalizers, SPATIAL_LOSSES["mse"]
        )
        return torch.stack(list(losses.values())).sum()

    return supervised if alone else distilled


def train_one(
    student: Student,
    loss: Callable[[Tensor, Tensor], Tensor],
    setting: StudentsSetup,
    *,
    seed: int,
    steps: int,
    title: str,
    interrupt: Interrupt,
) -> float:
    """Train a student, and return its milliseconds a step."""
    optimizer = build_optimizer(student, OPTIM)
    began, warm = time.perf_counter(), min(5, steps - 1)
    with Progress(title, total=steps, images=setting.config.batch) as watch:
        for step, (images, labels) in enumerate(setting.stream(seed, steps)):
            if step == warm:
                _wait(setting.device)
                began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, OPTIM)
            with setting.autocast():
                value = loss(images, labels)
            value.backward()
            clip_grad_norm_(student.parameters(), OPTIM.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % max(1, steps // 4) == 0:
                watch.report(step + 1, dict(loss=value.item()))
            if interrupt.signal is not None:
                raise Interrupted(interrupt.signal, f"Stopped in step {step + 1} of {title}.")
    _wait(setting.device)
    return 1e3 * (time.perf_counter() - began) / (steps - warm)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_one(
    setting: StudentsSetup, family: str, seed: int, way: str, steps: int, interrupt: Interrupt
) -> dict[str, Any]:
    """Train and measure one student of a seed in one of `WAYS`, and return its row."""
    alone, config = way == "alone", setting.config
    student = new_student(setting, family, seed, alone=alone)
    title = f"{family} {way} seed {seed}"
    step_ms = train_one(
        student, loss_of(student, setting, alone=alone), setting, seed=seed, steps=steps,
        title=title, interrupt=interrupt,
    )  # fmt: skip
    student.eval()
    row = dict(
        family=family, way=way, seed=seed, step_ms=step_ms,
        parameters=sum(p.numel() for p in student.backbone.parameters()),
    )  # fmt: skip
    with setting.autocast():
        row |= probe(student.features, setting.collection, config.size)
    if not alone:
        held = setting.collection.held.batches(config.size, 256)
        row |= dict(fidelity(folded(student, setting.normalizers), setting.teachers, held))
    text = "  ".join(f"{k} {v:.1f}" for k, v in row.items() if k.startswith(("knn", "linear")))
    print(f"{title}: {text}")
    return row


def choose_steps(setting: StudentsSetup, interrupt: Interrupt, began: float) -> int:
    """Measure a few steps of every student, and return how many fit into `config.seconds`.

    Args:
        began: When the experiment began, by `time.perf_counter`.
    """
    config, total = setting.config, 0.0
    if config.seconds is None:
        return config.steps
    for family in config.chosen:
        for way in WAYS:
            student = new_student(setting, family, 0, alone=way == "alone")
            loss = loss_of(student, setting, alone=way == "alone")
            total += train_one(
                student, loss, setting, seed=0, steps=15, title=f"time {family} {way}",
                interrupt=interrupt,
            )  # fmt: skip
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
    setting = prepare(config)
    about: dict[str, Any] = dict(config=asdict(config), teachers_s=time.perf_counter() - began)
    name = device_name(setting.device)
    rows: list[dict[str, Any]] = []
    for row in _teacher_rows(setting):
        rows.append(row)
        append_row(config.out / "rows.jsonl", row)
    try:
        with Interrupt() as interrupt:
            steps = choose_steps(setting, interrupt, began)
            about |= dict(steps=steps, device=name, pictures=len(setting.collection.train))
            for seed in range(config.seeds):  # outermost: the first seed completes the table
                for family in config.chosen:
                    for way in WAYS:
                        rows.append(run_one(setting, family, seed, way, steps, interrupt))
                        append_row(config.out / "rows.jsonl", rows[-1])
    finally:
        about["seconds"] = time.perf_counter() - began
        result = report(rows, about, config.out)
    return result


def _teacher_rows(setting: StudentsSetup) -> Iterator[dict[str, Any]]:
    for label, teacher in setting.teachers.items():
        with setting.autocast():
            values = probe(teacher, setting.collection, setting.config.size)
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
