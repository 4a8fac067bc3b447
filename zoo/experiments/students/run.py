"""`zoo experiment students`: one student of each family, against its teachers and itself alone.

Three teachers with three objectives are trained on your pictures. Each family's student learns
from all three, without a label; the same backbone learns the labels alone, from the same start,
on the same crops, for as many steps. The pictures stay on the device, decoded: the loop of `zoo
distill`, which decodes each image each time, would wait for its images here.
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
from zoo.experiments.pictures import Collection, Crop, Stream, read_collection, side_for
from zoo.experiments.probes import probe
from zoo.experiments.teachers import describe_teachers, measure_teachers, train_teacher
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.student import Student
from zoo.teachers.name import unknown_name
from zoo.teachers.pretext import Classifier, Gradients, PatchTransformer, PretextTeacher
from zoo.train.config import Optim
from zoo.train.device import autocast, device_of
from zoo.train.distill.config import Distill
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
"""5.0 to 5.8 M parameters each."""

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
"""For a laptop's rehearsal: not of like size, and too small to learn much."""

OPTIM = Optim(lr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup=0.1, ema=0.0)
WAYS = ("distilled", "alone")


@dataclass(frozen=True, kw_only=True)
class StudentsExperiment:
    """What is run, and how large."""

    data: tuple[Path, ...] = ()
    """Labelled image folders, shards or .npz; the digits and photographs that ship with
    scikit-learn and scikit-image if none."""
    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: int = 3
    steps: int = 500
    batch: int = 256
    size: int = 96
    """Side of the images in pixels."""
    teacher_steps: int = 1200
    teacher_seed: int = 0
    limit: int | None = None
    """Pictures of each split of each data set at most."""
    seconds: float | None = None
    """Take fewer steps than --steps, and say so, where this would not suffice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    out: Path = Path("runs/students")
    tiny: bool = False
    """Smallest networks and numbers: shows that it runs, in under a minute on a CPU."""
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
    def place(self) -> Distill:
        """Where it runs, as a distillation says it."""
        return Distill(device=self.device, precision=self.precision)

    @property
    def chosen(self) -> dict[str, Family]:
        """The families' students, of the size that is asked for."""
        table = TINY_FAMILIES if self.tiny else FAMILIES
        return {family: table[family] for family in self.families}


def full() -> StudentsExperiment:
    """The experiment as it is meant."""
    return StudentsExperiment()


def tiny() -> StudentsExperiment:
    """The same experiment, as small as it goes."""
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
class Setting:
    """What all students of the experiment share."""

    config: StudentsExperiment
    device: torch.device
    collection: Collection
    crop: Crop
    teachers: dict[str, PretextTeacher]
    normalizers: dict[str, Normalizer]

    def autocast(self) -> AbstractContextManager:
        return autocast(self.config.place, self.device)

    def stream(self, seed: int, steps: int) -> Stream:
        """Return the crops of a seed; both ways of learning see the same ones."""
        return Stream(
            self.collection.train, self.crop, batch=self.config.batch, steps=steps,
            seed=mix(seed, 31),
        )  # fmt: skip


def prepare(config: StudentsExperiment) -> Setting:
    """Read the pictures, train the teachers, fit PHI-S to each."""
    device = device_of(config.place)
    crop = Crop(size=config.size, flip=0.5 if config.data else 0.0)  # a mirrored digit is none
    collection = read_collection(config.data, side_for(config.size), device, config.limit)
    print(f"{len(collection.train)} pictures to train on, {len(collection.held)} held out")
    teachers = {}
    torch.manual_seed(mix(config.teacher_seed, 33))
    for label, (task, network) in networks(config).items():
        teachers[label] = train_teacher(
            task, network, collection, crop, steps=config.teacher_steps, batch=config.batch,
            seed=config.teacher_seed, autocast=lambda: autocast(config.place, device),
        )  # fmt: skip
    moments = measure_teachers(teachers, collection, crop, batch=config.batch)
    normalizers = {name: fit("phi_s", m) for name, m in moments.items()}
    config.out.mkdir(parents=True, exist_ok=True)
    told = json.dumps(describe_teachers(teachers, moments), indent=2)
    (config.out / "teachers.json").write_text(told + "\n")
    return Setting(config, device, collection, crop, teachers, normalizers)


def new_student(setting: Setting, family: str, seed: int, *, alone: bool) -> Student:
    """Build a backbone, the same for both ways, with heads for the teachers or a classifier."""
    name, options = setting.config.chosen[family]
    widths = {label: (t.summary_dim, t.spatial_dim) for label, t in setting.teachers.items()}
    torch.manual_seed(mix(seed, 32))  # the backbone is drawn before the heads
    student = build_student(
        name, {} if alone else widths, size=setting.config.size,
        options=dict(options, drop_path_rate=0.0),
    )  # fmt: skip
    if alone:
        seen = student.eval().features(Batch(torch.zeros(1, 3, *student.size)))
        assert seen.summary is not None
        student.classifier = nn.Linear(seen.summary.shape[-1], setting.collection.classes)
    return student.train().to(setting.device)


def loss_of(
    student: Student, setting: Setting, *, alone: bool
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
    setting: Setting,
    *,
    seed: int,
    steps: int,
    title: str,
    interrupt: Interrupt,
) -> float:
    """Train a student; give its milliseconds a step."""
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
    setting: Setting, family: str, seed: int, way: str, steps: int, interrupt: Interrupt
) -> dict[str, Any]:
    """Train and measure one student of one seed in one way."""
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
    told = "  ".join(f"{k} {v:.1f}" for k, v in row.items() if k.startswith(("knn", "linear")))
    print(f"{title}: {told}")
    return row


def choose_steps(setting: Setting, interrupt: Interrupt, began: float) -> int:
    """Measure a few steps of every student, and choose how many fit into `config.seconds`.

    Args:
        began: When the experiment did, by `time.perf_counter`.
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
    """Run the experiment; give its result, which is also written to `config.out`.

    Raises:
        ValueError: something that the config names is wrong.
        Interrupted: a signal came; finished students are kept and reported.
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
            for seed in range(config.seeds):  # a whole table after the first seed
                for family in config.chosen:
                    for way in WAYS:
                        rows.append(run_one(setting, family, seed, way, steps, interrupt))
                        append_row(config.out / "rows.jsonl", rows[-1])
    finally:
        about["seconds"] = time.perf_counter() - began
        result = report(rows, about, config.out)
    return result


def _teacher_rows(setting: Setting) -> Iterator[dict[str, Any]]:
    for label, teacher in setting.teachers.items():
        with setting.autocast():
            values = probe(teacher, setting.collection, setting.config.size)
        count = sum(p.numel() for p in teacher.network.parameters())
        print(f"teacher {label}: " + "  ".join(f"{k} {v:.1f}" for k, v in values.items()))
        yield dict(family="teacher", way=label, seed=0, parameters=count, **values)


def main(config: StudentsExperiment) -> bool:
    """Run; nothing is promised, so whatever is seen is a result."""
    run(config)
    return True


def plan(config: StudentsExperiment) -> None:
    """Print the models and the number of runs; nothing is written."""
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
