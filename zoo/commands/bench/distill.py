"""Measure distillation steps, print their parts beside the cost model, keep them."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from zoo.commands.bench.step_parts import ModelPool, Step, StepTiming, best_parts, measure
from zoo.eval.speed.environment import environment

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
    steps: Sequence[Step],
    *,
    device: str,
    rounds: int,
    out: Path | None = None,
    kernels: int = 0,
    command: str | None = None,
) -> list[StepTiming]:
    """Measure `steps`, print each as soon as it is known, and write the JSON file `out`."""
    screen, waiting, began = console(), Console(stderr=True, highlight=False), time.perf_counter()
    rows: list[StepTiming] = []

    def say(text: str) -> None:
        waiting.print(f"{time.perf_counter() - began:4.0f} s  {text}", soft_wrap=True, markup=False)

    pool = ModelPool(torch.device(device), say)
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
    for label, report in row.fidelity.items():
        table.caption += (
            f"\n{label}: {report['kind']} in {len(report['layers'])} of {report['of']} layers "
            f"({report['share']:.0%} of the work), fidelity {report['fidelity']:,.0f}; all layers "
            f"{report['all_layers']:,.0f}"
        )
    for kernel in row.kernels:
        times = f" {kernel.times_floor:.1f} x its floor" if kernel.times_floor else ""
        line = f"{kernel.share:.1%} {1e3 * kernel.seconds:.2f} ms {kernel.calls:g} x {kernel.name}"
        table.caption += f"\n{line[:110]}{times}"
    return table
