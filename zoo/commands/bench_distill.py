"""`zoo bench distill`: measure distillation steps, print parts beside the cost model, keep them."""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from zoo.commands.parse import parse, resolve_device
from zoo.commands.step_parts import ModelPool, Step, StepTiming, best_parts, measure
from zoo.eval.speed.models import environment

TRIO = Step(
    name="trio",
    teachers=(
        "timm:vit_huge_patch14_clip_378.dfn5b/random@378",
        "timm:vit_giant_patch14_reg4_dinov2/random@224",
    ),
    student="vit_base_patch16_224",
    size=432,
    batch=128,
    alone=True,
)
"""AM-RADIO's two teachers of every image, and a student that costs less than either."""
TINY = Step(
    name="tiny",
    teachers=("timm:test_vit/random@160", "timm:test_vit2/random@160"),
    student="test_vit",
    size=160,
    batch=4,
    compiled=False,
)
"""For a look at the command on a laptop."""


def console() -> Console:
    made = Console()
    return made if made.is_terminal else Console(width=150)  # a file has no width to keep to


def measure_steps(
    steps: Sequence[Step], *, device: str, rounds: int, out: Path | None = None,
    kernels: int = 0, command: str | None = None,
) -> list[StepTiming]:  # fmt: skip
    """Measure `steps`, print each as soon as it is known, and write the JSON file `out`."""
    screen, pool, rows = console(), ModelPool(torch.device(device)), []
    for step in steps:
        best = best_parts(rows)
        row = measure(step, pool, rounds=rounds, best=best, kernels=kernels)
        rows.append(row)
        screen.print(part_table(row))
        if out:
            write(out, rows, pool.rate, command=command)
    if out:
        screen.print(f"wrote {out}", highlight=False, markup=False)
    return rows


def write(
    out: Path, rows: Iterable[StepTiming], rate: float, *, command: str | None = None, **more: Any
) -> None:
    """Write what is known so far, with the machine, the versions and the date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {**environment(command), "matmul_tflops": rate / 1e12, **more}
    out.write_text(json.dumps({**run, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")


def part_table(row: StepTiming) -> Table:
    """Show where a step's time goes, each part beside the cost model's."""
    step = row.step
    form = "compiled" if step.compiled else "eager"
    beside = ", teachers one batch ahead" * step.overlap
    table = Table(
        title=f"{step.name}: {step.student}@{step.size}, batch {step.batch}, "
        f"{step.precision} teachers, {form}{beside}",
        box=SIMPLE_HEAD,
    )
    for column in ("part", "ms/image", "share", "GFLOP/image", "model ms", "model/measured"):
        table.add_column(column, justify="left" if column == "part" else "right")
    whole = row.milliseconds
    for name, ms in {**row.parts, "step": whole}.items():
        flops = row.gflops.get(step.student if name == "student" else name)
        modelled = row.model.get(name)
        table.add_row(
            name,
            f"{ms:.3f}",
            f"{ms / whole:.1%}",
            f"{flops * (3 if name == 'student' else 1):,.0f}" if flops else "-",
            f"{modelled:.3f}" if modelled else "-",
            f"{modelled / ms:.2f}" if modelled and ms else "-",
            style="bold" if name == "step" else "",
        )
    peak = f", peak {row.peak_gib:.1f} GiB" if row.peak_gib is not None else ""
    table.caption = (
        f"{row.images_per_s:,.1f} img/s ±{row.spread:.1%}, engine efficiency {row.efficiency:.3f} "
        f"(heads as overhead {row.bare_efficiency:.3f}){peak}; {row.seconds:.0f} s to measure"
    )
    for label, told in row.fidelity.items():
        table.caption += (
            f"\n{label}: {told['kind']} in {len(told['layers'])} of {told['of']} layers "
            f"({told['share']:.0%} of the work), fidelity {told['fidelity']:,.0f}; all layers "
            f"{told['all_layers']:,.0f}"
        )
    for kernel in row.kernels:
        times = f" {kernel.times_floor:.1f} x its floor" if kernel.times_floor else ""
        told = f"{kernel.share:.1%} {1e3 * kernel.seconds:.2f} ms {kernel.calls:g} x {kernel.name}"
        table.caption += f"\n{told[:110]}{times}"
    return table


@dataclass(frozen=True, kw_only=True)
class StepArgs:
    teachers: tuple[str, ...] = ()
    """As `zoo distill` takes them; CLIP ViT-H/14@378 and DINOv2 ViT-g/14@224 with random weights
    on a GPU, two tiny ViTs elsewhere."""
    student: str | None = None
    size: int | None = None
    batch: int | None = None
    precision: Literal["bf16", "int8", "fp8"] = "bf16"
    """Of the teachers' products."""
    gate: float = 1000.0
    """Least fidelity of teachers in 8 bits; 0 for all layers, whatever they lose."""
    compile: bool | None = None
    """Teachers' blocks and student; on a GPU unless told otherwise."""
    overlap: bool = False
    """Teachers one batch ahead, on a stream of their own."""
    device: str = "auto"
    rounds: int = 10
    out: Path | None = None
    """Write this JSON file."""
    profile: bool = False
    """Name the step's ten most expensive kernels."""


def main(args: list[str]) -> None:
    """Measure a distillation step and each of its parts alone, beside the cost model.

    Example: zoo bench distill --teachers timm:vit_small_patch14_dinov2/random@224
    --student eradio_xxxtiny --size 224 --batch 32
    """

    asked = parse(StepArgs, args, "bench distill", main.__doc__ or "")
    device = resolve_device(asked.device)
    on_gpu = device == "cuda"
    given = {name: getattr(asked, name) for name in ("teachers", "student", "size", "batch")}
    step = replace(
        TRIO if on_gpu else TINY,
        **{name: value for name, value in given.items() if value},
        precision=asked.precision, gate=asked.gate, overlap=asked.overlap,
        compiled=on_gpu if asked.compile is None else asked.compile,
    )  # fmt: skip
    measure_steps(
        [step], device=device, rounds=asked.rounds, out=asked.out,
        kernels=10 * asked.profile, command=shlex.join(["zoo", "bench", "distill", *args]),
    )  # fmt: skip
