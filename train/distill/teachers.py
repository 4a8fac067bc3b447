"""What makes a step run at the speed of its teachers: their precision, their compilation, overlap.

Nothing here changes what a step computes, but for 8-bit teachers, whose fidelity is measured.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from torch import nn

from zoo.compiled_blocks import allow_variants, repeated_blocks
from zoo.data.feed import plan_of
from zoo.data.loader import train_batches
from zoo.features import Batch, Features
from zoo.files import checked_fields
from zoo.teachers.folded_attention import fold_relative_positions
from zoo.teachers.mosaic import Mosaic, pack
from zoo.teachers.quantize import (
    QuantKind,
    QuantReport,
    quantize_layers,
    quantize_linears,
    share_quantized,
)
from zoo.teachers.teacher import Frozen, Teacher
from zoo.train.distill.config import Distill
from zoo.train.distill.placement import shard_teacher, sharded
from zoo.train.distill.setup import Setup
from zoo.train.distill.sizes import every_size, frozen
from zoo.train.distill.speed import Speed
from zoo.train.mesh import by_first, is_first
from zoo.train.run import Run
from zoo.train.shard import mesh_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Model = Callable[[Batch], Features]
Precision = Literal["auto", "bf16", "int8", "fp8"]

MOST = 0.8
"""Share of the weights that repeated blocks hold in a network made of them."""


def optimize_teachers(
    teachers: Mapping[str, Teacher],
    *,
    precision: Precision,
    compiled: bool,
    sample: Callable[[], Batch],
    decided: Mapping[str, QuantReport] | None = None,
    meshes: Mapping[str, "DeviceMesh"] = MappingProxyType({}),
) -> dict[str, QuantReport]:
    """Bring the teachers into the form in which they run fastest; in place.

    Which layers go into 8 bits is measured once: by rank 0, whose choice all take.

    Args:
        precision: `auto` leaves the weights as they are; `bf16` keeps them in bfloat16 with
            float32 norms; `int8` and `fp8` then put linear layers into 8 bits (`quantize_linears`).
        compiled: Compile their blocks (`compile_teacher`).
        sample: Gives images on which 8-bit teachers are measured.
        decided: What was measured before, by label; those are not measured again.
        meshes: Ranks over which a teacher is cut (`shard_teacher`), by its label.

    Returns:
        What became of the teachers that went into 8 bits.

    Raises:
        ValueError: a teacher loses too much in 8 bits, or the machine has no such products.
    """
    found = {}
    for label, teacher in teachers.items():
        networks = frozen(teacher)
        if precision != "auto":
            for network in networks:
                network.to_bf16()
        if networks and precision in ("int8", "fp8"):
            first, *others = networks
            before = (decided or {}).get(label)
            if before and before.kind == precision:
                quantize_layers(first, precision, before.layers)
                found[label] = before
            else:
                found[label] = _eight(first, every_size(teacher)[0], sample(), precision)
            for other in others:
                share_quantized(first, other)
        if label in meshes:
            for network in networks if compiled else ():
                fold_relative_positions(network.network)  # reads weights
            shard_teacher(teacher, meshes[label])
        if compiled:
            for network in networks:
                compile_teacher(network)
    return found


def _eight(network: Frozen, teacher: Teacher, batch: Batch, kind: QuantKind) -> QuantReport:
    if isinstance(teacher, Mosaic):
        batch = Batch(pack(batch.at(teacher.size, network.interpolation), teacher.k))
    report = by_first(partial(quantize_linears, network, batch, kind))
    if not is_first():
        quantize_layers(network, kind, report.layers)
    return report


def compile_teacher(teacher: Frozen) -> None:
    """Compile a teacher for one static shape; in place.

    SAM's attention takes a form for flash kernels first (`zoo.teachers.folded_attention`).
    Blocks that repeat (timm's `blocks`, transformers' `layers`) share their code, so one is
    compiled for all: seconds instead of minutes. A network that is not made of such blocks is
    compiled whole.
    """
    fold_relative_positions(teacher.network)
    allow_variants()
    blocks = repeated_blocks(teacher.network)
    if sum(map(_size, blocks)) < MOST * _size(teacher.network):
        teacher.features = torch.compile(teacher.features, dynamic=False)
        return
    for block in blocks:
        block.compile(dynamic=False)


def is_compiled(teacher: Frozen) -> bool:
    """Tell whether `compile_teacher` has been here."""
    blocks = repeated_blocks(teacher.network)
    return "features" in vars(teacher) or any(b._compiled_call_impl is not None for b in blocks)


def uncompile_teacher(teacher: Frozen) -> None:
    """Let a teacher run as it is written again; in place."""
    vars(teacher).pop("features", None)
    for block in repeated_blocks(teacher.network):
        block._compiled_call_impl = None


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


QUANTIZED = "quantized.json"
"""In a run's folder: what was measured, and which layers are in 8 bits."""

SAMPLE = 16
"""Images on which the fidelity of 8-bit teachers is measured."""


def optimize_run_teachers(run: Run, setup: Setup, speed: Speed) -> None:
    """Bring the teachers into the precision that the config asks for, and the form of the run."""
    config, console = setup.config, Console(stderr=True, highlight=False)
    decided = by_first(lambda: run.read_json(QUANTIZED, dict[str, dict[str, Any]])) or {}
    known = {
        label: checked_fields(QuantReport, one | {"layers": tuple(one["layers"])}, QUANTIZED)
        for label, one in decided.items()
    }
    labels = sharded(config)
    mesh = mesh_of("hsdp", setup.device) if labels else None
    if not labels and is_first():
        for spec in (spec for spec in config.teachers if spec.place == "shard"):
            console.print(f"{spec.name}: there is one process, so place=shard leaves it whole.")
    reports = optimize_teachers(
        setup.teachers,
        precision=teacher_precision(config, setup.device),
        compiled=speed.teachers and (not speed.beside or bool(labels)),
        sample=lambda: first_batch(setup),
        decided=known,
        meshes={label: mesh for label in labels if mesh},
    )
    if reports:
        run.write_json(QUANTIZED, {n: dataclasses.asdict(t) for n, t in reports.items()})
    for label, one in reports.items() if is_first() else ():
        console.print(f"{label}: {one.describe()}")


def teacher_precision(config: Distill, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 where the run is, on CUDA."""
    in_bf16 = config.teacher_precision == "auto" and config.precision != "float32"
    return "bf16" if in_bf16 and device.type == "cuda" else config.teacher_precision


def first_batch(setup: Setup) -> Batch:
    """Return the training images of step 0, no more than a precision needs to be measured."""
    config = setup.config
    few = plan_of(setup.train, min(config.batch, SAMPLE), config.seed)
    part = next(train_batches(setup.train, setup.view, few, steps=1))
    return Batch(part["images"], part["keys"]).to(setup.device)
