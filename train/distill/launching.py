"""What launching kernels takes, told before a network is built.

A host that launches kernels one by one needs its time for each, however small the kernel is. The
rule: every operator that computes something is one launch, in the forward pass of a teacher, and in
the forward and the backward pass of the student.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.features import Batch
from zoo.students.student import Student
from zoo.teachers.name import TeacherName
from zoo.teachers.teacher import Teacher
from zoo.train.device import autocast, in_precision
from zoo.train.distill.config import Distill
from zoo.train.distill.memory import on_shapes
from zoo.train.distill.sizes import every_size

ONE_BY_ONE = 20e-6
"""Seconds of the host for an operator that runs as it is written, in training.

MambaVision-T on an H200 (2026-12-02, row mamba of `benchmarks/distill_speed.py`): a step of 256
images at 160 px took 68.6 ms so and 18.3 in CUDA graphs, so launching was the limit. Its operators
are 2,819 by this count in bfloat16 (2,464 in float32), as a CPU runs them, or 24 µs each; the value
leaves room for what a host does in less. Steps that it was not taken from: docs/scale.md.
"""
IN_GRAPHS = 1.8e-6
"""The same between two kernels of a CUDA graph (docs/speed.md, MambaVision-L)."""
FREE = ("prim::device", "aten::detach", "aten::empty", "aten::_unsafe_view")
"""Beginnings of the names of operators that launch nothing, beside those that return views."""


class Launching(NamedTuple):
    """What launching takes, in a step of one slice of the student."""

    operators: int
    seconds: float
    computing: float
    """Seconds of its arithmetic."""

    def describe(self, images: int) -> str | None:
        """Say that launching is the limit, and what would help; `None` if it is not.

        Args:
            images: Of the slice.
        """
        if self.seconds <= self.computing:
            return None
        enough = -(-int(images * self.seconds / max(self.computing, 1e-9)) // 8) * 8
        return (
            f"launching is the limit: about {self.operators:,} operators of the student take "
            f"{1e3 * self.seconds:,.1f} ms to launch, and computing on {images} images "
            f"{1e3 * self.computing:,.1f}; --batch {enough} would take hardly longer for a step "
            "(where more images than the recipe's are not wanted, fewer --slices: each is launched "
            "by itself)"
        )


def launching(operators: int, computing: float, *, graphs: bool) -> Launching:
    """Apply the rule.

    Args:
        operators: Of a slice, forward and backward.
        computing: Seconds that their arithmetic takes.
        graphs: They are recorded in CUDA graphs.
    """
    return Launching(operators, operators * (IN_GRAPHS if graphs else ONE_BY_ONE), computing)


@dataclass(frozen=True)
class Operators:
    """How many operators of each model launch a kernel, for a slice; its images change nothing."""

    teachers: Mapping[str, int]
    """Of a forward pass, by label; without those that are no networks, or somebody's own."""
    student: int
    """Forward and backward."""
    average: int
    """Of a forward pass of the student's average, the teacher of MESA; 0 without it."""

    @classmethod
    def of(
        cls,
        config: Distill,
        teachers: Mapping[str, Teacher],
        student: Student,
        device: torch.device,
    ) -> "Operators":
        """Count each model once, at the size of its evaluations; nothing is computed.

        Args:
            teachers: In the config's order, on the meta device, in the precision of the run.
            student: On the meta device too; all stay as they are.
            device: As of `count_operators`.
        """
        counted = {}
        for spec, (label, teacher) in zip(config.teachers, teachers.items(), strict=True):
            own = TeacherName.parse(spec.name).kind == "torch"  # may not run on shapes alone
            network = every_size(teacher)[0]
            if isinstance(network, nn.Module) and not own:
                counted[label] = count_forward(network, config, device)
        mesa, side = bool(config.losses.mesa), config.size
        return cls(
            counted,
            count_operators(student, side, config, device),
            count_average(student, side, config, device) if mesa else 0,
        )


def count_forward(teacher: nn.Module, config: Distill, device: torch.device) -> int:
    """Count what a teacher of one size computes with; arguments as of `Operators.of`."""
    with on_shapes(teacher, config, device) as (network, batch), _Counted() as counted:
        network(batch)
    return counted.operators


def count_operators(student: Student, side: int, config: Distill, device: torch.device) -> int:
    """Count what a student computes with, forward and backward; nothing is computed here.

    Args:
        student: On the meta device; it stays as it is.
        device: Whose kernels count: some operators are one kernel on a GPU, and many elsewhere.
    """
    with _training(student, side, config, device) as (ours, batch), _Counted() as counted:
        with autocast(config.precision, device):
            answers = ours(batch, size=(side, side), mesa=bool(config.losses.mesa))
        outputs = [x for features in answers.values() for x in features if x is not None]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return counted.operators


def count_average(student: Student, side: int, config: Distill, device: torch.device) -> int:
    """Count what a student's average computes its own map with; arguments as `count_operators`."""
    with (
        _training(student, side, config, device) as (ours, batch),
        torch.no_grad(),
        autocast(config.precision, device),
        _Counted() as counted,
    ):
        ours.own_map(batch, size=(side, side))
    return counted.operators


@contextmanager
def _training(
    student: Student, side: int, config: Distill, device: torch.device
) -> Iterator[tuple[Student, Batch]]:
    """Give a copy of a student in training and two images, shapes alone within this context."""
    student = in_precision(copy.deepcopy(student), config.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = student.to_empty(device=device).train()
        yield student, Batch(torch.zeros(2, 3, side, side, device=device))


class _Counted(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += not (func.is_view or func.name().startswith(FREE))
        return func(*args, **(kwargs or {}))
