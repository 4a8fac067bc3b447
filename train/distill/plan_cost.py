"""What a run would cost, without its weights: parameters, shapes and FLOPs on the meta device."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zoo.features import Batch
from zoo.flops import total_flops
from zoo.students.student import Student
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.memory import weight_bytes
from zoo.train.distill.placement import teacher_blocks
from zoo.train.distill.setup import meta_models
from zoo.train.distill.sizes import every_size, frozen
from zoo.train.distill.teachers import Precision, teacher_precision

EFFICIENCY = 0.4
"""Share of a plain matrix product's rate that a training step is assumed to reach."""


@dataclass(frozen=True)
class Cost:
    """What one model of a run costs."""

    label: str
    params: int
    bytes: int
    """Of its weights and buffers in memory: a teacher's at its precision, once for all sizes. With
    8 bits it is what bfloat16 takes, as it is before the layers are quantized."""
    size: tuple[int, int]
    """Rows and columns of its images, in pixels."""
    grid: tuple[int, int] | None
    """Rows and columns of its spatial map."""
    summary_dim: int | None
    spatial_dim: int | None
    flops: float
    """Of the forward pass of one image."""
    blocks: tuple[int, ...] = ()
    """Bytes of those blocks that are cut over the ranks of a node (place=shard)."""


def model_costs(
    config: Distill, device: torch.device | str = "cpu"
) -> tuple[list[Cost], Cost, Student]:
    """Count what the models of a run cost, without building their weights.

    Args:
        device: Of the run, which decides the precision of the teachers.

    Returns:
        The cost of each teacher in the config's order, that of the student with its heads, and
        the student itself.

    Raises:
        ValueError: as `meta_models`.
    """
    teachers, student = meta_models(config)
    return *costs_of(config, teachers, student, device), student


def costs_of(
    config: Distill,
    teachers: Mapping[str, Teacher],
    student: Student,
    device: torch.device | str = "cpu",
) -> tuple[list[Cost], Cost]:
    """Count what models cost that are there, on the meta device; as `model_costs`.

    Args:
        teachers: In the config's order; they get the precision of the run.
    """
    precision = teacher_precision(config, torch.device(device))
    costs = [
        _teacher_cost(label, teacher, precision, cut=spec.place == "shard")
        for (label, teacher), spec in zip(teachers.items(), config.teachers, strict=True)
    ]
    batch = Batch(torch.zeros(1, 3, *student.size, device="meta"))
    features = student.features(batch)
    assert features.summary is not None and features.spatial is not None
    rows, cols, width = features.spatial.shape[1:]
    ours = Cost(
        config.student,
        count_parameters(student),
        weight_bytes(student),
        student.size,
        (rows, cols),
        features.summary.shape[-1],
        width,
        float(total_flops(lambda: student(batch), student)),
    )
    return costs, ours


def _teacher_cost(label: str, teacher: Teacher, precision: Precision, *, cut: bool) -> Cost:
    own = every_size(teacher)[0]
    images = own.k**2 if isinstance(own, Mosaic) else 1
    batch = Batch(torch.zeros(images, 3, *teacher.size, device="meta"))
    networks = [teacher] if isinstance(teacher, nn.Module) else []
    flops, params, held = total_flops(lambda: teacher(batch), *networks) / images, 0, 0
    if isinstance(teacher, nn.Module):
        for network in frozen(teacher) if precision != "auto" else []:
            network.to_bf16()
        params, held = count_parameters(teacher), weight_bytes(teacher)
    return Cost(
        label, params, held, teacher.size, teacher.grid, teacher.summary_dim, teacher.spatial_dim,
        flops, tuple(teacher_blocks(teacher)) if cut else (),
    )  # fmt: skip


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


def matmul_rate(device: torch.device) -> float:
    """Measure the FLOP/s of a plain matrix product on `device`.

    In bfloat16 on CUDA and in float32 elsewhere, as training computes there.
    """
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


def image_flops(config: Distill, teachers: Sequence[Cost], student: Cost) -> float:
    """Count the FLOPs of training on one image, on average over the steps.

    Args:
        teachers: In the order of `config.teachers`.
    """
    *teaching, learning = forward_flops(config, teachers, student)
    return sum(teaching) + passes(config) * learning


def sampled(config: Distill, spec: TeacherSpec) -> float:
    """Return the share of the steps in which a teacher runs."""
    drawn = config.sizes and not config.partition
    return spec.rate / (len(config.sizes) if spec.at and drawn else 1)


def passes(config: Distill) -> int:
    """Count a step's forward passes of the student; a backward pass is two, MESA's average one."""
    return 3 + bool(config.losses.mesa)


def forward_flops(config: Distill, teachers: Sequence[Cost], student: Cost) -> list[float]:
    """Count the FLOPs of forward passes of one image, on average: of each teacher, of the student.

    A teacher counts by its rate, in the steps of its size. Where the size differs from step to
    step, the student's work and that of teachers that follow it grow with the number of pixels.
    """
    counts = config.images_by_size
    by_size = [flops_at(size, config, teachers, student) for size in counts]
    return [
        sum(n * work for n, work in zip(counts.values(), each, strict=True)) / sum(counts.values())
        for each in zip(*by_size, strict=True)
    ]


def flops_at(size: int, config: Distill, teachers: Sequence[Cost], student: Cost) -> list[float]:
    """Count the FLOPs of an image at a size of the student, as `forward_flops`."""
    pixels = (size / config.size) ** 2
    teaching = [
        cost.flops * spec.rate * (pixels if spec.follow else 1.0) * (spec.at in (0, size))
        for cost, spec in zip(teachers, config.teachers, strict=True)
    ]
    return [*teaching, student.flops * pixels]
