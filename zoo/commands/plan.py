"""What a run would be, without its weights: models on the meta device, bytes, steps a second."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.student import Student
from zoo.teachers.cache import CacheManifest
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher
from zoo.train.device import device_of
from zoo.train.distill.caching import break_even
from zoo.train.distill.config import Distill
from zoo.train.distill.setup import backbone_options, check_names, open_data, widths
from zoo.train.run import Run

EFFICIENCY = 0.4
"""Share of a plain matrix product's rate that a training step is assumed to reach."""


@dataclass(frozen=True)
class Cost:
    """One model of the plan; FLOPs of the forward pass of one image."""

    label: str
    params: int
    size: tuple[int, int]
    grid: tuple[int, int] | None
    summary_dim: int | None
    spatial_dim: int | None
    flops: float


def plan(config: Distill) -> tuple[list[Cost], Cost, Student]:
    """Build teachers and student on the meta device: the same code paths, no memory.

    Raises:
        ValueError: whatever would stop the run for its models.
    """
    check_names(config)
    teachers = {
        label: open_teacher(spec.name, device="meta", mosaic=spec.mosaic)
        for label, spec in zip(config.labels, config.teachers, strict=True)
    }
    options: dict[str, Any] = {**dataclasses.asdict(config.heads), **backbone_options(config)}
    options["spectral_norms"] = False  # which cost no FLOP to speak of
    student = build_student(
        config.student, widths(config, teachers), size=config.size, **options, device="meta"
    ).eval()
    costs = [_teacher_cost(label, teacher) for label, teacher in teachers.items()]
    batch = Batch(torch.zeros(1, 3, *student.size, device="meta"))
    seen = student.features(batch)
    assert seen.summary is not None and seen.spatial is not None
    rows, cols, width = seen.spatial.shape[1:]
    ours = Cost(
        config.student,
        _params(student),
        student.size,
        (rows, cols),
        seen.summary.shape[-1],
        width,
        _flops(lambda: student(batch)),
    )
    return costs, ours, student


def _teacher_cost(label: str, teacher: Teacher) -> Cost:
    images = teacher.k**2 if isinstance(teacher, Mosaic) else 1
    batch = Batch(torch.zeros(images, 3, *teacher.size, device="meta"))
    params = _params(teacher) if isinstance(teacher, nn.Module) else 0
    return Cost(
        label, params, teacher.size, teacher.grid, teacher.summary_dim, teacher.spatial_dim,
        _flops(lambda: teacher(batch)) / images,
    )  # fmt: skip


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def matmul_rate(device: torch.device) -> float:
    """Measure FLOP/s of a plain matrix product on `device`, in the precision that training uses."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    x = torch.randn(side, side, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.mm(x, x)
    wait()
    began, count = time.perf_counter(), 5
    for _ in range(count):
        torch.mm(x, x)
    wait()
    return count * 2 * side**3 / (time.perf_counter() - began)


def print_plan(config: Distill) -> None:
    """Print models, shapes, bytes and the estimated speed of a run."""
    Run.refuse_existing(config.out)
    device = device_of(config)
    teachers, student, model = plan(config)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width that names should be cut to
    table = Table(title="Models")
    for column in ("model", "parameters", "image", "grid", "summary", "spatial", "GFLOP/image"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for cost, role in [*((t, "teacher") for t in teachers), (student, "student")]:
        table.add_row(
            f"{role} {cost.label}",
            f"{cost.params / 1e6:,.2f} M",
            f"{cost.size[0]}x{cost.size[1]}",
            f"{cost.grid[0]}x{cost.grid[1]}" if cost.grid else "-",
            str(cost.summary_dim or "-"),
            str(cost.spatial_dim or "-"),
            f"{cost.flops / 1e9:,.2f}",
        )
    console.print(table)
    for line in _estimates(config, device, teachers, student, model):
        console.print(line, highlight=False)


def _estimates(
    config: Distill, device: torch.device, teachers: list[Cost], student: Cost, model: Student
) -> list[str]:
    weights = 4 * sum(cost.params for cost in teachers)
    trained = 4 * student.params * (4 + bool(config.optim.ema))  # weights, gradient, two moments
    checkpoint = 4 * student.params * (3 + bool(config.optim.ema))
    tokens = sum(t.grid[0] * t.grid[1] * (t.spatial_dim or 0) for t in teachers if t.grid)
    work = config.batch * image_flops(config, teachers, student)
    speed = EFFICIENCY * matmul_rate(device) / work
    arms = 1 + len(config.compare)
    cached = _cache_estimate(config, teachers, matmul_rate(device)) if config.cache else []
    hours = arms * config.steps / speed / 3600
    backbone = _params(model.backbone)
    return [
        f"student: backbone {backbone / 1e6:,.2f} M, heads "
        f"{(student.params - backbone) / 1e6:,.2f} M parameters",
        f"memory: teachers {_size(weights)}, student with optimizer {_size(trained)}, "
        f"targets of a batch {_size(4 * config.batch * tokens)}; a checkpoint {_size(checkpoint)}",
        f"work: {work / 1e12:,.2f} TFLOP a step of {config.batch} images; about {speed:.2g} "
        f"steps/s = {speed * config.batch:.2g} img/s on this {device.type} (estimated at "
        f"{EFFICIENCY:.0%} of its matrix product)",
        *cached,
        f"{config.steps} steps x {arms} student(s): about {hours:.2g} h. Nothing was written.",
    ]


def image_flops(config: Distill, teachers: Sequence[Cost], student: Cost) -> float:
    """Count the FLOPs of training on one image, on average over the steps.

    A teacher counts by its rate. Where steps have sizes of their own, the student's work and that
    of teachers that follow it grow with the pixels.
    """
    pixels = [(size / config.size) ** 2 for size in config.sizes or (config.size,)]
    area = sum(pixels) / len(pixels)
    asked = sum(
        cost.flops * spec.rate * (area if spec.follow else 1.0)
        for cost, spec in zip(teachers, config.teachers, strict=True)
    )
    return asked + 3 * area * student.flops


def _cache_estimate(config: Distill, teachers: list[Cost], rate: float) -> list[str]:
    """Say what a cache would cost and save; the teachers' speed is estimated, the disk's timed."""
    assert config.cache is not None
    count = len(open_data(config)[0])
    about = {t.label: dict(grid=t.grid, spatial_dim=t.spatial_dim, summary_dim=t.summary_dim)
             for t in teachers}  # fmt: skip
    held = CacheManifest(
        images=count, data="", seed=config.seed, views=config.views, view={}, shard=1,
        normalise=config.normalise, stored=config.cache_dtype, teachers=about,
    )  # fmt: skip
    live = sum(t.flops for t in teachers) / (EFFICIENCY * rate)
    return break_even(held, config.cache, live).describe()


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
