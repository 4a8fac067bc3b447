"""Whether launching a student's kernels takes longer than running them, told before it is built.

A host that launches kernels one by one needs its time for each, however small the kernel is. The
rule: every operator of the forward and the backward pass that computes something is one launch.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.features import Batch
from zoo.students.student import Student
from zoo.train.device import autocast, in_precision
from zoo.train.distill.config import Distill

ONE_BY_ONE = 20e-6
"""Seconds of the host for an operator that runs as it is written, in training.

MambaVision-T on an H200 (2026-12-02, row mamba of `benchmarks/distill_speed.py`): a step of 256
images at 160 px took 68.6 ms so and 18.3 in CUDA graphs, so launching was the limit. Its operators
are 2,414 by this count, as a CPU runs them, or 28 µs each; the value leaves room for what a host
does in less.
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


def count_operators(student: Student, side: int, config: Distill, device: torch.device) -> int:
    """Count what a student computes with, forward and backward; nothing is computed here.

    Args:
        student: On the meta device; it stays as it is.
        device: Whose kernels count: some operators are one kernel on a GPU, and many elsewhere.
    """
    student = in_precision(copy.deepcopy(student), config.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = student.to_empty(device=device).train()
        batch = Batch(torch.zeros(2, 3, side, side, device=device))
        with _Counted() as counted:
            with autocast(config.precision, device):
                answers = student(batch, size=(side, side), mesa=bool(config.losses.mesa))
            outputs = [x for features in answers.values() for x in features if x is not None]
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return counted.operators


class _Counted(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += not (func.is_view or func.name().startswith(FREE))
        return func(*args, **(kwargs or {}))
