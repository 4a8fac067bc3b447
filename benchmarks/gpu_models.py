"""Measure the zoo's models on one GPU, in one run, beside timm's and beside the published code.

    python benchmarks/gpu_models.py --out benchmarks/results/h200.json --seconds 540

Needs torch, timm and this repository, nothing else. Rows are measured one after the other, in the
order of `--list`; each is written to --out as soon as it is measured, failures with their reason.
After --seconds no further row is started, and those left out are named. Batch 128, median of 20 by
CUDA events, random weights.

    --list                        number and name all rows, measure nothing
    --rows 0-12,40                only these
    --models mambavision_t ...    only these (without options: all rows of that name)
    --group inference train ...   only these groups; see GROUPS
    --profile 5                   also print the five most expensive kernels of each row
    --cudnn-benchmark [N]         let cuDNN try N of its convolutions (torch tries 10), or all
    --compare FILE                ratios with an earlier run's JSON
    --plot FILE                   draw how the rows of `growth` grow with the image, as a PNG
    --device cpu --batch 2 --size-factor 0.5 --rounds 2 --models mambavision_t   a dry rehearsal
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where zoo is not installed

from zoo.eval.speed.cost import name_and_options
from zoo.eval.speed.environment import environment
from zoo.eval.speed.models import Case, Measured, measure, words

MODELS: dict[str, int] = {
    "mambavision_t": 224,
    "mambavision_s": 224,
    "mambavision_b": 224,
    "mambavision_l": 224,
    "fastervit_0": 224,
    "fastervit_2": 224,
    "fastervit_4": 224,
    # The published network keeps windows of 16, larger than stage 3's map at 256, and enlarges it.
    "eradio_l,window_size=16": 256,
    "eradio_xxxtiny,window_size=16": 256,
    "eradio_l,window_size=8": 256,
    "eradio_xxxtiny,window_size=8": 256,
    "convnext_tiny": 224,
    "swin_tiny_patch4_window7_224": 224,
    "vit_small_patch16_224": 224,
    "vit_base_patch16_224": 224,
}
"""Models, and the side of their images."""

INFERENCE = (  # mode, precision, channels last
    ("eager", "amp", True),
    ("deploy+graphs", "bf16", True),
    ("deploy+compiled", "bf16", True),
    ("compiled", "amp", True),
    ("deploy+compiled", "amp", True),
    ("eager", "bf16", True),
    ("deploy", "bf16", True),
)
TRAINING = (
    ("train+graphs", "amp", True),
    ("train+graphs", "bf16", True),
    ("train+compiled", "amp", True),
    ("train", "amp", True),
)
EXTRA = (
    ("deploy+autotuned", "bf16", True),
    ("deploy+compiled", "bf16", False),
    ("eager", "amp", False),
    ("train+compiled", "bf16", True),
    ("train+autotuned", "bf16", True),
    ("deploy+graphs", "amp", True),
    ("train+graphs+blocks", "bf16", True),
    ("train+compiled+blocks", "bf16", True),
)
GROWING = ("mambavision_t", "fastervit_0", "eradio_xxxtiny", "radio_vit_base_patch16")
GROUPS = ("inference", "train", "extra", "growth")
"""`growth` takes one model of each family to 512 and 1024 px, at an eighth of the batch."""


class Published(NamedTuple):
    """Images/s of the published code in its faster mode, and GiB; one H200, the same protocol."""

    inference: float
    training: float
    training_was_compiled: bool = True
    peak_gib: float | None = None
    wanted: float | None = None
    """Images/s of inference that this repository aims for."""


PUBLISHED = {
    "mambavision_t": Published(13013, 3438, peak_gib=4.0, wanted=21000),
    "mambavision_s": Published(9887, 3106, False, wanted=15000),
    "mambavision_b": Published(7132, 2098, peak_gib=8.9, wanted=11000),
    "mambavision_l": Published(2700, 883, False, peak_gib=15.5, wanted=4500),
    "fastervit_0": Published(12829, 2119, peak_gib=3.9, wanted=19000),
    "fastervit_2": Published(4812, 1523, False, wanted=9500),
    "fastervit_4": Published(2839, 649, False, peak_gib=21.2, wanted=4200),
    "eradio_l": Published(1512, 453, peak_gib=46.6, wanted=3000),
    "eradio_xxxtiny": Published(3343, 1337, False, wanted=15000),
    "convnext_tiny": Published(15501, 2852, False),
    "vit_base_patch16_224": Published(11036, 2745, False),
    "swin_tiny_patch4_window7_224": Published(5603, 2205, False),
}
"""Some are timm's own, whose code is the same: their ratios show how alike the machines are."""


def all_rows(device: str, batch: int) -> list[tuple[str, Case]]:
    """List every row with its group; the most important come first, for a short lease."""
    rows = []
    groups = {"inference": INFERENCE[:2], "train": TRAINING}, {"inference": INFERENCE[2:]}
    for part in (*groups, {"extra": EXTRA}):
        for group, variants in part.items():
            rows += [
                (group, case)
                for mode, precision, last in variants
                for name, size in MODELS.items()
                for case in [_case(name, size, batch, mode, precision, last, device)]
            ]
    for name in GROWING:
        for size in (256 if name.startswith("eradio") else 224, 512, 1024):
            for mode in ("deploy+graphs", "train+graphs"):
                few = max(1, batch // 8)
                rows.append(("growth", _case(name, size, few, mode, "bf16", True, device)))
    return rows


def _case(
    name: str, size: int, batch: int, mode: str, precision: str, last: bool, device: str
) -> Case:
    return Case(
        model=name,
        size=size,
        batch=batch,
        mode=mode,
        precision=precision,
        channels_last=last,
        device=device,
    )


def chosen(
    rows: Sequence[tuple[str, Case]],
    numbers: str | None,
    models: Sequence[str] | None,
    groups: Sequence[str] | None,
) -> dict[int, Case]:
    """Keep the rows that the options choose, by their numbers.

    Raises:
        ValueError: nothing is left.
    """
    wanted = set(range(len(rows)))
    if numbers:
        wanted &= {n for part in numbers.split(",") for n in _span(part)}
    kept = {
        number: case
        for number, (group, case) in enumerate(rows)
        if number in wanted
        and (not groups or group in groups)
        and (not models or {case.model, name_and_options(case.model)[0]} & set(models))
    }
    if not kept:
        raise ValueError(f"No row is left of {len(rows)}; --list shows them with their numbers.")
    return kept


def _span(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def line_of(number: int, row: Measured, earlier: dict[Case, Measured]) -> str:
    """Format one row as a line of text."""
    label = f"{number:3d} {row.case.describe():68s}"
    if row.error:
        return f"{label} {row.error}"
    parts = [f"{row.images_per_s:9,.0f} img/s", f"{row.macs_per_s / 1e12:6.1f} TMAC/s"]
    if row.peak_bytes is not None:
        parts.append(f"{row.peak_bytes / 2**30:5.1f} GiB")
    if row.relative_error is not None:
        parts.append(f"error {row.relative_error:.1e}")
    before = published(row)
    if before:
        parts.append(f"{row.images_per_s / before:.2f} x published")
    then = earlier.get(row.case)
    if then and then.seconds:
        parts.append(f"{row.images_per_s / then.images_per_s:.2f} x earlier")
    return f"{label} {', '.join(parts)}, first call {row.first_seconds:.0f} s"


def published(row: Measured) -> float | None:
    """Return the published code's images/s for `row`, in its faster mode; `None` if unknown."""
    known = PUBLISHED.get(name_and_options(row.case.model)[0])
    if known is None or row.case.size != MODELS.get(row.case.model):
        return None
    return known.training if "train" in words(row.case.mode) else known.inference


def summary(rows: Sequence[Measured]) -> list[str]:
    """Format each model's best inference and training row beside the published code's."""
    lines = [
        "| model | best inference | img/s | x published | wanted | best training | img/s "
        "| x published | wanted | peak GiB (published) |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for model, size in MODELS.items():
        mine = [r for r in rows if r.case.model == model and r.case.size == size and r.seconds]
        if not mine:
            continue
        known = PUBLISHED.get(name_and_options(model)[0])
        cells = [model]
        for training in (False, True):
            some = [row for row in mine if ("train" in words(row.case.mode)) == training]
            best = max(some, key=lambda row: row.images_per_s, default=None)
            if best is None:
                cells += ["-"] * 4
                continue
            base = published(best)
            goal = known.wanted if known else None
            if training and known and known.wanted:
                goal = known.training * (1.6 if known.training_was_compiled else 2)
            variant = f"{best.case.mode} {best.case.precision}{' cl' * best.case.channels_last}"
            cells += [variant, f"{best.images_per_s:,.0f}"]
            cells += [f"{best.images_per_s / base:.2f}" if base else "-"]
            cells += [f"{goal:,.0f}" if goal else "-"]
            if training:
                peak = (best.peak_bytes or 0) / 2**30
                limit = known.peak_gib if known and known.peak_gib else "-"
                cells.append(f"{peak:.1f} ({limit})")
        lines.append(f"| {' | '.join([*cells, '-'][:10])} |")
    return lines


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rows")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--group", nargs="+", choices=GROUPS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size-factor", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--cudnn-benchmark", type=int, nargs="?", const=0, metavar="N")
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows that the command line chooses."""
    args = options(argv)
    cases = chosen(all_rows(args.device, args.batch), args.rows, args.models, args.group)
    if args.size_factor != 1:
        side = lambda case: max(32, int(case.size * args.size_factor) // 32 * 32)  # noqa: E731
        cases = {number: replace(case, size=side(case)) for number, case in cases.items()}
    if args.list:
        for number, case in cases.items():
            print(f"{number:3d} {case.describe()}")
        return
    if args.cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = args.cudnn_benchmark  # 0: no limit
    earlier = {row.case: row for row in read_rows(args.compare)} if args.compare else {}
    rows: list[Measured] = []
    setup = {**environment(), "rounds": args.rounds, "in_turns": False, "peer": None}
    measured = measure(
        list(cases.values()),
        rounds=args.rounds,
        warmup=args.warmup,
        accuracy=not args.no_accuracy,
        kernels=args.profile,
        seconds=args.seconds,
    )
    for number, row in zip(cases, measured, strict=True):
        rows.append(row)
        print(line_of(number, row, earlier), flush=True)
        print_kernels(row)
        if args.out:
            write(args.out, setup, rows)
    print("\n".join(["", *summary(rows)]))
    if args.plot:
        from zoo.eval.speed.growth import draw_growth

        args.plot.write_bytes(draw_growth([row for row in rows if row.case.batch < args.batch]))
    left = [number for number, row in zip(cases, rows, strict=True) if not row.seconds]
    if left:
        print(f"\nWithout a figure: --rows {','.join(map(str, left))}")


def print_kernels(row: Measured) -> None:
    """Print where a row's time goes, if it was profiled."""
    for kernel in row.kernels:
        floor = "floor unknown"
        if kernel.times_floor:
            floor = f"{kernel.times_floor:.1f} x its {kernel.bound} floor (estimated)"
        print(
            f"      {kernel.share:5.1%} {1e3 * kernel.seconds:8.3f} ms {kernel.calls:5g} x "
            f"{kernel.name[:90]} <- {kernel.op[:60]}: {floor}"
        )


def write(out: Path, setup: dict[str, Any], rows: Sequence[Measured]) -> None:
    """Write the rows so far, in the form that `zoo bench models --compare` reads too."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**setup, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")


def read_rows(path: Path) -> list[Measured]:
    """Read the rows of an earlier run."""
    return [Measured.from_json(row) for row in json.loads(path.read_text())["rows"]]


if __name__ == "__main__":
    main()
