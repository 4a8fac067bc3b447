"""Measure the distillation engine on one GPU, in one run: what a step costs, part by part.

    python benchmarks/distill_engine.py --out benchmarks/results/distill-h200.json --seconds 460

Needs torch, timm and this repository; the weights are random, of the real shapes. Rows are measured
one after the other, in the order of `--list`. Each is printed and written to --out as soon as it is
measured; one that fails is written with its reason. No row starts after --seconds.

    --list              list all rows, measure nothing
    --rows a c-plain    measure these rows only
    --profile 8         also list the 8 most expensive kernels of each step
    --tiny --device cpu rehearse with tiny models
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where zoo is not installed

from zoo.commands.bench.distill import console, part_table, write
from zoo.commands.bench.step_parts import (
    Clock,
    ModelPool,
    Step,
    StepTiming,
    best_parts,
    free,
    measure,
    pink_noise,
)
from zoo.teachers.mosaic import Mosaic, border_effect
from zoo.teachers.teacher import Frozen
from zoo.train.distill.config import TeacherSpec

CLIP = "timm:vit_huge_patch14_clip_378.dfn5b/random@378"
DINO = "timm:vit_giant_patch14_reg4_dinov2/random@224"
SAM = "timm:samvit_huge_patch16/random+neck@1024"

BASE = Step(
    name="a", teachers=(CLIP, DINO), student="vit_base_patch16_224", size=432, batch=128, alone=True
)
TILES = Step(
    name="c",
    teachers=(CLIP, DINO, f"{SAM},mosaic=4"),
    student="vit_base_patch16_224",
    size=432,
    batch=128,
)
LAST = replace(BASE, alone=False, channels_last=True)
"""The base of the rows whose students have convolutions."""
STEPS = (
    replace(BASE, name="a-plain", compiled=False),
    BASE,
    replace(
        TILES, name="c-plain", teachers=(CLIP, DINO, f"{SAM},summary=0"), batch=16, compiled=False
    ),
    TILES,
    replace(BASE, name="b-int8", precision="int8"),
    replace(BASE, name="b-fp8", precision="fp8"),
    replace(BASE, name="b-fp8-ungated", precision="fp8", gate=0.0),
    replace(BASE, name="a-overlap", overlap=True),
    replace(LAST, name="d-fastervit", student="fastervit_2", size=224),
    replace(LAST, name="d-eradio", student="eradio_l", size=416, batch=64),
    replace(BASE, name="b-int8-ungated", precision="int8", gate=0.0, alone=False),
)
"""The rows of the table, the most important first."""

PAIRS = (
    ("a", "a-plain"),
    ("a-overlap", "a"),
    ("b-int8", "a"),
    ("b-fp8", "a"),
    ("b-fp8-ungated", "a"),
    ("b-int8-ungated", "a"),
    ("c", "c-plain"),
)
"""Rows whose speeds are compared: the first is so many times as fast as the second."""


def tiny(step: Step) -> Step:
    """Return a step with the same parts, small enough for a laptop."""
    small = {
        CLIP: "timm:test_vit/random@160",
        DINO: "timm:test_vit2/random@160",
        SAM: "timm:vit_tiny_patch16_224/random@128",
    }
    teachers = []
    for text in step.teachers:
        name, _, options = text.partition(",")
        teachers.append(",".join(filter(None, (small[name], options.replace("4", "2")))))
    student = "eradio_nano" if step.student == "eradio_l" else "test_vit"
    return replace(
        step,
        teachers=tuple(teachers),
        student=student,
        size=160,
        batch=min(step.batch, 6),
        compiled=False,
        gate=min(step.gate, 10.0),
    )


def mosaic_row(step: Step, pool: ModelPool, rounds: int) -> dict[str, Any]:
    """Measure how a mosaic changes features (`border_effect`), and the cost of an image in it."""
    spec = TeacherSpec.parse(step.teachers[-1])
    mosaic, _ = pool.ready(spec, step)
    whole, _ = pool.ready(replace(spec, mosaic=1), step)
    assert isinstance(mosaic, Mosaic) and isinstance(whole, Frozen)
    canvases = max(1, step.batch // spec.mosaic**2)  # as compiled
    small = pink_noise(canvases * spec.mosaic**2, max(mosaic.size), pool.device)
    large = pink_noise(canvases, max(whole.size), pool.device)
    found: dict[str, Any] = dict(teacher=spec.describe(), k=spec.mosaic, tile=mosaic.size)
    for others in ("same", "black"):
        found[f"border_effect_{others}"] = border_effect(mosaic, [small], others)._asdict()
    for name, teacher, batch in (("mosaic", mosaic, small), ("alone", whole, large)):
        clock = Clock(pool.device, len(batch.images), rounds, 2)
        found[f"ms_{name}"] = clock.median(lambda t=teacher, b=batch: t(b))
    found["times_cheaper"] = found["ms_alone"] / found["ms_mosaic"]
    return found


def main() -> None:
    """Measure the rows that the command line chooses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, help="instead of each row's own, where it is larger")
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    steps = [tiny(step) for step in STEPS] if args.tiny else list(STEPS)
    if args.rows:
        known = [step.name for step in steps]
        unknown = set(args.rows) - set(known)
        if unknown:
            raise SystemExit(f"No row {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
        steps = [step for step in steps if step.name in args.rows]
    if args.batch:
        steps = [replace(step, batch=min(step.batch, args.batch)) for step in steps]
    if args.list:
        print("\n".join(f"{s.name:16} {s.student}@{s.size} {' '.join(s.teachers)}" for s in steps))
        return
    run(steps, args)


def run(steps: list[Step], args: argparse.Namespace) -> None:
    """Measure one row after the other; one that fails is written with its reason."""
    end = time.monotonic() + args.seconds
    screen, pool = console(), ModelPool(torch.device(args.device))
    screen.print(f"a plain product runs at {pool.rate / 1e12:,.1f} TFLOP/s")
    rows: list[StepTiming] = []
    mosaic: dict[str, Any] = {}

    def keep() -> None:
        if args.out:
            write(args.out, rows, pool.rate, mosaic=mosaic)

    for i, step in enumerate(steps):
        if time.monotonic() > end:
            rows.append(StepTiming(step=step, error=f"not run: the {args.seconds:g} s were over"))
            continue
        rows.append(one(step, pool, rows, args))
        if rows[-1].error:
            screen.print(f"{step.name}: {rows[-1].error}", highlight=False, markup=False)
        else:
            screen.print(part_table(rows[-1]))
        keep()
        if "mosaic" in step.teachers[-1] and not rows[-1].error:
            mosaic |= mosaic_row(step, pool, args.rounds)
            screen.print(mosaic)
            keep()
        wanted = {spec.name for later in steps[i + 1 :] for spec in later.specs}
        pool.drop(wanted.__contains__)
    keep()
    screen.print(*comparisons(rows), sep="\n", highlight=False)


def one(
    step: Step, pool: ModelPool, before: list[StepTiming], args: argparse.Namespace
) -> StepTiming:
    """Measure one row; if it fails, return the reason."""
    best = best_parts(row for row in before if not row.error)
    try:
        return measure(step, pool, rounds=args.rounds, best=best, kernels=args.profile)
    except Exception as failure:  # the other rows are still worth having
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:600]}"
    free(pool.device)
    return StepTiming(step=step, error=reason)


def comparisons(rows: list[StepTiming]) -> list[str]:
    """Return a table of all rows as lines of text, and the comparisons of `PAIRS`."""
    speed = {row.step.name: row.images_per_s for row in rows if row.milliseconds}
    lines = [f"{'row':16} {'img/s':>9} {'efficiency':>10} {'bare':>6} {'peak GiB':>9} {'model':>6}"]
    for row in rows:
        if row.milliseconds:
            ratio = row.model["step"] / row.milliseconds
            lines.append(
                f"{row.step.name:16} {row.images_per_s:9,.1f} {row.efficiency:10.3f} "
                f"{row.bare_efficiency:6.3f} {row.peak_gib or 0:9.1f} {ratio:6.2f}"
            )
    for ours, theirs in PAIRS:
        if ours in speed and theirs in speed:
            lines.append(f"{ours} is {speed[ours] / speed[theirs]:.2f} x {theirs}")
    return lines


if __name__ == "__main__":
    main()
