"""What all experiments share: fitting into a time, naming the device, keeping rows."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from zoo.files import written_whole
from zoo.train.run import Run

LEAST = 10
"""Fewest steps, however short the time is."""


def affordable(
    steps: int, seconds_a_step: float, wanted: float | None, spent: float, *, share: float
) -> int:
    """Return how many steps fit into the time, in tens; print it if they are fewer than `steps`.

    Args:
        wanted: Seconds in which the whole experiment should end; `None` for no limit.
        spent: Seconds that have passed.
        share: Share of `wanted` after which training should end.
    """
    print(f"{steps} steps would take {steps * seconds_a_step:.0f} s to train")
    if wanted is None:
        return steps
    left = share * wanted - spent
    fits = min(steps, max(LEAST, int(left / seconds_a_step) // 10 * 10))
    if fits < steps:
        print(f"REDUCED: {fits} steps instead of {steps}, to end in {wanted:.0f} s")
    return fits


def step_ms(run: Run) -> float:
    """Return the milliseconds of a step of a run, without the steps before its first log line.

    During those, kernels are chosen and memory is allocated. Each log line waits for the device, so
    the time between two lines is that of their steps.
    """
    rows = [json.loads(line) for line in (run.path / "timing.jsonl").read_text().splitlines()]
    first, *timed = [dict(step=0), *rows] if len(rows) == 1 else rows
    return 1e3 * sum(row["seconds"] for row in timed) / (timed[-1]["step"] - first["step"])


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or CPU."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def begin_rows(out: Path, *, resume: bool, same: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make an experiment's folder, or read the rows of the one that goes on in it.

    A row that was not written to its end is left out.

    Args:
        same: Fields in which it must be as it was begun (`config` in its about.json).

    Raises:
        ValueError: the folder exists; or there is nothing to go on with, or something else.
    """
    if not resume:
        Run.refuse_existing(out)
        out.mkdir(parents=True, exist_ok=True)
        return []
    about = Run(out).read_json("about.json")
    if about is None:
        raise ValueError(f"There is no run in {out} to resume; leave out --resume.")
    if other := [name for name, value in same.items() if about["config"].get(name) != value]:
        was = ", ".join(f"--{name.replace('_', '-')} {about['config'].get(name)}" for name in other)
        raise ValueError(
            f"The run in {out} was begun with {was}; resume it with that, or give another --out."
        )
    rows, path = list[dict[str, Any]](), out / "rows.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
