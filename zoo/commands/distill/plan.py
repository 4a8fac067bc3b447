"""What a run would be, without its weights: models on the meta device, bytes, steps a second."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from zoo.commands.elastic.sizes import sizes_beside
from zoo.data.names import Weighted, is_stream
from zoo.data.remote import is_remote
from zoo.files import near
from zoo.students.student import Student
from zoo.teachers.cache import CacheManifest
from zoo.teachers.name import TeacherName
from zoo.train.device import device_of, workers_of
from zoo.train.distill.caching import break_even
from zoo.train.distill.config import Distill
from zoo.train.distill.launching import count_operators, launching
from zoo.train.distill.memory import largest_slice, step_bytes, weight_bytes
from zoo.train.distill.placement import away
from zoo.train.distill.plan_cost import (
    EFFICIENCY,
    Cost,
    count_parameters,
    image_flops,
    matmul_rate,
    model_costs,
    passes,
)
from zoo.train.distill.setup import meta_models, open_data
from zoo.train.distill.speed import choose
from zoo.train.run import Run

MOST_RUN = 10**10
"""Parameters of teachers that are run on shapes alone in seconds, for an estimate of memory."""
NODE = 8
"""Processes of a node for which is said what place=shard would leave on each."""


def print_plan(config: Distill) -> None:
    """Print models, shapes, bytes and the estimated speed of a run."""
    Run.refuse_existing(config.out)
    device = device_of(config.device)
    teachers, student, model = model_costs(config, device)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width that names should be cut to
    table = Table(title="Models")
    for column in ("model", "parameters", "image", "grid", "summary", "spatial", "GFLOP/image"):
        table.add_column(column, justify="left" if column == "model" else "right")
    parts = [(t, "teacher, cut" if t.blocks else "teacher") for t in teachers]
    for cost, role in [*parts, (student, "student")]:
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
    lines = _estimates(config, device, teachers, student, model)
    form = _form(config, device, teachers, student)
    for line in [*lines[:-1], *form, *_missing(config.data), lines[-1]]:
        console.print(line, highlight=False)


def _missing(data: str) -> list[str]:
    """Say which data the run would not find here; it may be planned for another machine."""
    if is_stream(data) or data.startswith("embedded"):
        return []
    weighted = Weighted.parse(data)
    places = weighted.names if weighted else [data] if data else []
    return [
        f"data: there is nothing at {place} here.{near(place)}"
        for place in places
        if not is_remote(place) and not Path(place).exists()
    ]


def _form(config: Distill, device: torch.device, costs: list[Cost], ours: Cost) -> list[str]:
    """Say in which form the run would be computed, what a step of it holds, and its launching."""
    speed = choose(config, device, nested=sizes_beside(config.student) is not None)
    form = f"form: {speed.describe()}; {workers_of(config.workers, device)} workers"
    if speed.beside and config.speed == "auto":
        form += "; the first steps run plain, and all do if they would be over sooner"
    own = any(TeacherName.parse(spec.name).kind == "torch" for spec in config.teachers)
    if own or sum(cost.params for cost in costs) > MOST_RUN:
        return [form]  # somebody's own teacher may not run on shapes alone
    teachers, student = meta_models(config)
    held = step_bytes(config, device, teachers, student, compiled=speed.blocks)
    _, count = largest_slice(config)
    average = weight_bytes(student) if config.optim.ema else 0
    whole = sum(weight_bytes(t) for t in teachers.values() if isinstance(t, nn.Module))
    weights = held.weights - whole + sum(cost.bytes for cost in costs) + average
    live = held.saved + held.peak if speed.overlap else max(held.saved, held.peak)
    images = held.images * (2 if speed.overlap else 1)
    slow = _launching(config, device, student, ours, graphs=speed.graphs)
    return [
        form,
        *([slow] if slow else []),
        f"a step holds about {size_text(weights + count * (live + images))}: weights "
        f"{size_text(weights)}, for each of {count} images {size_text(held.saved)} between the "
        f"student's layers, {size_text(held.peak)} in a teacher, {size_text(images)} of pixels",
    ]


def _launching(
    config: Distill, device: torch.device, student: Student, ours: Cost, *, graphs: bool
) -> str | None:
    """Say where launching the student's kernels is the limit, which it is on a GPU alone."""
    if device.type != "cuda":
        return None
    side, count = largest_slice(config)
    work = passes(config) * ours.flops * (side / config.size) ** 2 * count
    computing = work / (EFFICIENCY * matmul_rate(device))
    operators = count_operators(student, side, config, device)
    return launching(operators, computing, graphs=graphs).describe(count)


def _estimates(
    config: Distill, device: torch.device, teachers: list[Cost], student: Cost, model: Student
) -> list[str]:
    weights = sum(cost.bytes for cost in teachers)
    trained = 4 * student.params * (4 + bool(config.optim.ema))  # weights, gradient, two moments
    checkpoint = 4 * student.params * (3 + bool(config.optim.ema))
    images = config.batch // config.num_slices
    tokens = sum(t.grid[0] * t.grid[1] * (t.spatial_dim or 0) for t in teachers if t.grid)
    batch = config.samples
    work = batch * image_flops(config, teachers, student)
    speed = EFFICIENCY * matmul_rate(device) / work
    arms = 1 + len(config.compare)
    cached = _cache_estimate(config, teachers, matmul_rate(device)) if config.cache_folder else []
    hours = arms * config.steps / speed / 3600
    cut = sum(away(t.blocks, NODE) for t in teachers)
    shard = [f"place=shard: on {NODE} processes of a node each holds {size_text(weights - cut)} of "
             "the teachers"] if cut else []  # fmt: skip
    backbone = count_parameters(model.backbone)
    return [
        f"student: backbone {backbone / 1e6:,.2f} M, heads "
        f"{(student.params - backbone) / 1e6:,.2f} M parameters",
        f"memory: teachers {size_text(weights)}, student with optimizer {size_text(trained)}, "
        f"targets of a slice {size_text(4 * images * tokens)}; "
        f"a checkpoint {size_text(checkpoint)}",
        *shard,
        f"work: {work / 1e12:,.2f} TFLOP a step of {batch:g} images; about {speed:.2g} "
        f"steps/s = {speed * batch:.2g} img/s on this {device.type} (estimated at "
        f"{EFFICIENCY:.0%} of its matrix product)",
        *cached,
        f"{config.steps} steps x {arms} student(s): about {hours:.2g} h. Nothing was written.",
    ]


def _cache_estimate(config: Distill, teachers: list[Cost], rate: float) -> list[str]:
    """Say what a cache would cost and save; the teachers' speed is estimated, the disk's timed."""
    assert config.cache_folder is not None
    count = len(open_data(config)[0])
    about = {
        t.label: dict(grid=t.grid, spatial_dim=t.spatial_dim, summary_dim=t.summary_dim)
        for t in teachers
    }
    held = CacheManifest(
        images=count,
        data="",
        seed=config.seed,
        views=config.view_epochs,
        view={},
        shard=1,
        normalise=config.normalise,
        stored=config.cache_dtype,
        teachers=about,
    )
    live = sum(t.flops for t in teachers) / (EFFICIENCY * rate)
    return break_even(held, config.cache_folder, live).describe()


def size_text(count: float) -> str:
    """Return a number of bytes as text."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
