"""What all experiments share: fitting into a time, naming the device, keeping rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
