"""How long a step of a rank takes: its arithmetic beside the launching of its kernels. Modelled.

A GPU computes while its host launches what comes next, one kernel after another, so the longer of
the two counts. For a rank that takes S slices, launched each by itself:

    step = S · max(Σ computing, Σ launching)

Both sums go over the teachers, over the student's forward and backward pass, and over MESA's
average. Computing is that of `train/cost.py`, launching that of `train/distill/launching.py`: so
long for each operator that runs as it is written, or in a CUDA graph. A student that is compiled
without graphs launches as if it were not. What a compiler leaves of a teacher's operators is taken
to launch in no time, and so are losses and the optimizer. That the host waits for the GPU somewhere
in a step, and then cannot launch ahead, is not in it either. How far that is off stands in
docs/scale.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from zoo.commands.cluster.models import Models
from zoo.commands.elastic.sizes import sizes_beside
from zoo.teachers.name import TeacherName
from zoo.train.cluster import Gpu
from zoo.train.cost import Estimate, estimate
from zoo.train.distill.config import Distill
from zoo.train.distill.launching import ONE_BY_ONE, Operators, launching
from zoo.train.distill.plan_cost import flops_at, passes
from zoo.train.distill.speed import Speed, choose
from zoo.train.distill.worth import SETTLING, TIMED, too_short
from zoo.train.shard import Method


class StepTime(NamedTuple):
    """Seconds of a step of a rank, without waiting for others."""

    seconds: float
    computing: float
    """If launching took no time."""
    launching: float
    """If computing took no time."""


def step_time(config: Distill, models: Models, gpus: int, gpu: Gpu, form: Speed) -> StepTime:
    """Estimate a step of a rank: the mean over sizes that are drawn, the slower group's of a
    partition."""
    slices, found = config.num_slices / gpus, list[StepTime]()
    for size, images in config.slice_images.items():
        work = flops_at(size, config, list(models.teachers.values()), models.student)
        computing = slices * images * seconds_of(config, work, gpu, form).total
        launched = slices * slice_launching(config, models.operators, form, size)
        found.append(StepTime(max(computing, launched), computing, launched))
    if config.groups:
        return max(found)
    return StepTime(*(sum(part) / len(found) for part in zip(*found, strict=True)))


def slice_launching(config: Distill, operators: Operators, form: Speed, size: int) -> float:
    """Return the seconds in which a host launches a slice, on average over the steps.

    Args:
        size: Side of the student's images, which decides what teachers with `at=` do.
    """
    plain = float(operators.average)
    if not form.teachers:
        for label, spec in zip(config.labels, config.teachers, strict=True):
            plain += operators.teachers.get(label, 0) * spec.rate * (spec.at in (0, size))
    ours = launching(operators.student, 0.0, graphs=form.graphs)
    return plain * ONE_BY_ONE + ours.seconds


def form_of(config: Distill, models: Models, gpus: int, gpu: Gpu, method: Method) -> Speed:
    """Return the form in which a run computes most of its steps, on GPUs.

    With speed=auto they compile where the plain steps would take long enough; here the model says
    how long they take.
    """
    nested = sizes_beside(config.student) is not None
    form = choose(config, torch.device("cuda"), nested=nested, processes=gpus)
    if config.compile:
        form = replace(form, blocks=True)
    if method != "ddp":
        form = form.without("a student whose weights are cut is not compiled", blocks=False)
    if not form.beside or config.speed != "auto":
        return form
    plain = choose(replace(config, speed="plain"), torch.device("cuda"))
    step = step_time(config, models, gpus, gpu, plain).seconds
    left = config.steps - SETTLING - TIMED
    reason = too_short(step, left, warm=False)
    return replace(plain, why=(reason,)) if reason else form


def seconds_of(config: Distill, flops: Sequence[float], gpu: Gpu, form: Speed) -> Estimate:
    """Return what computing an image takes, from the FLOPs of each teacher and of the student."""
    *teaching, learning = flops
    names = [TeacherName.parse(spec.name).name for spec in config.teachers]
    return estimate(
        dict(zip(config.labels, zip(names, teaching, strict=True), strict=True)),
        (config.student, passes(config) / 3 * learning),
        gpu.tflops * 1e12,
        compiled=form.teachers,
        student_compiled=form.blocks,
    )


def student_seconds(config: Distill, mean: float, gpus: int) -> list[float]:
    """Return the student's time of a step at each size, from that of an image on average."""
    counts = config.images_by_size
    pixels = [n * size**2 for size, n in counts.items()]
    return [mean * sum(counts.values()) / gpus * part / sum(pixels) for part in pixels]
