"""Whether compiling pays in what is left of a run, which a few plain steps tell."""

import statistics
import time
from itertools import pairwise

import torch

SETTLING = 4
"""Steps that are not timed: kernels are built in them, and the loader starts."""
TIMED = 8
"""Steps whose median is the time of a step."""
COLD = 200.0
"""Seconds of plain training, with empty caches, from which compiling pays.

Measured on an H200 (2026-12-02, row mamba of `benchmarks/distill_speed.py`, 300 steps of 256
images): compiled training began 103 s after the first step could have, 64 plain steps were done by
then, and a step took 44 ms from then on instead of 108. That is even after 1,470 steps, or 165 s of
plain training; the rest is for networks that gain less.
"""
WARM = 40.0
"""The same with warm caches: 22 s stood still, which is even after 240 steps, or 32 s."""


class Pace:
    """Time the first steps of a run, each to its end on the device.

    Args:
        first: The first step.
    """

    def __init__(self, device: torch.device, first: int):
        self.device, self.first = device, first
        self._begun: dict[int, float] = {}

    def saw(self, step: int) -> None:
        """Note that a step begins, or that another slice of it does."""
        if step in self._begun or not SETTLING <= step - self.first <= SETTLING + TIMED:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._begun[step] = time.perf_counter()

    def seconds(self) -> float | None:
        """Return the seconds a step; `None` before enough of them have ended."""
        if len(self._begun) <= TIMED:
            return None
        times = list(self._begun.values())
        return statistics.median(b - a for a, b in pairwise(times))


def too_short(seconds: float, steps: int, *, warm: bool) -> str | None:
    """Return why compiling would not pay; `None` if it does.

    Args:
        seconds: Of a plain step.
        steps: That are left.
        warm: All that is to be compiled lies in the caches.
    """
    left, least = seconds * steps, WARM if warm else COLD
    if left >= least:
        return None
    caches = "with what the caches hold" if warm else "with empty caches"
    return (
        f"the {steps} steps left take about {left:.0f} s as they are, and compiling pays from "
        f"{least:.0f} s {caches}"
    )
