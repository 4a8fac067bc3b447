"""How long each rank works in a step before it waits for the others, and who keeps them waiting.

All ranks end a step together, so the wall time of a step tells nothing of who was late. What a
rank does before its gradients meet the others' does: its batch, its teachers, its forward passes,
and all backward passes but the last. With weights that are cut over ranks a forward pass waits as
well, and the times draw near to each other.
"""

import math
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from zoo.train.mesh import gather
from zoo.train.progress import Progress

LIMIT = 1.3
"""Of the slowest rank's 99th percentile over the median of all: above it there is a warning."""
FEWEST = 100
"""Steps that a percentile needs: of fewer it is the longest, which may be one hiccup."""
WINDOW = 500
"""Latest steps that are judged."""
WARM_UP = 10
"""First steps of a process, which compile and choose kernels."""


class StepClock:
    """The seconds that this rank works in each step, on the device; reading waits for no step.

    `begin` comes before a step's first batch, `end` before each backward pass: the last one counts.
    A step that does not count is NaN.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._began: list[Any] = []
        self._ended: list[Any] = []
        self._left_out: set[int] = set()

    def begin(self) -> None:
        self._began.append(self._now())

    def end(self, *, counts: bool = True) -> None:
        del self._ended[len(self._began) - 1 :]
        self._ended.append(self._now())
        if not counts:
            self._left_out.add(len(self._ended) - 1)

    def read(self) -> list[float]:
        """Return the times of the steps since it was last read; call it when the device is done."""
        pairs = list(zip(self._began, self._ended, strict=True))
        left_out, self._left_out = self._left_out, set()
        self._began, self._ended = [], []
        if self.on_gpu and pairs:
            pairs[-1][1].synchronize()
        return [math.nan if i in left_out else self._between(*p) for i, p in enumerate(pairs)]

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self.on_gpu else last - first

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def lateness(times: Float[np.ndarray, "steps ranks"]) -> float:
    """Return the 99th percentile of the slowest rank's times over the median of all times.

    A step takes as long as its slowest rank. For one rank it is p99 / p50 of its steps.
    """
    return float(np.quantile(times.max(axis=1), 0.99) / np.median(times))


def skew(times: Float[np.ndarray, "steps ranks"]) -> list[float]:
    """Return each rank's median time over the median of all."""
    return (np.median(times, axis=0) / np.median(times)).round(3).tolist()


class Stragglers:
    """Compares the ranks' times, and warns of those that keep the others waiting."""

    def __init__(self, progress: Progress):
        self.progress, self.warned, self._left_out = progress, False, 0
        self._times: Float[np.ndarray, "steps ranks"] | None = None

    def report(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Return what the log says of the steps since the last report; every rank calls this.

        `skew` has a number for each rank; `p99_p50` (see `lateness`) is of the latest steps, once
        there are enough. Above `LIMIT` rank 0 warns, and again only after it was below.

        Args:
            seconds: Of this rank, one a step; NaN leaves a step out on all ranks.
        """
        everywhere = gather((socket.gethostname(), list(seconds)))
        new = np.array([times for _, times in everywhere]).T
        new = new[np.isfinite(new).all(axis=1)]
        if not new.size:
            return {}
        found: dict[str, Any] = dict(skew=skew(new))
        fresh = new[max(0, WARM_UP - self._left_out) :]
        self._left_out += len(new) - len(fresh)
        known = fresh if self._times is None else np.concatenate([self._times, fresh])
        self._times = known[-WINDOW:]
        if len(self._times) < FEWEST:
            return found
        late = lateness(self._times)
        if late > LIMIT and not self.warned:
            self.progress.print(warning(self._times, [host for host, _ in everywhere]))
        self.warned = late > LIMIT
        return found | dict(p99_p50=round(late, 3))


def warning(times: Float[np.ndarray, "steps ranks"], hosts: Sequence[str]) -> str:
    """Say how late the slowest rank is, and which one it mostly is."""
    counts = np.bincount(times.argmax(axis=1), minlength=times.shape[1])
    worst = int(counts.argmax())
    return (
        f"Stragglers: over {len(times)} steps the 99th percentile of the slowest process is "
        f"{lateness(times):.2f} times the median (above {LIMIT:g} is too much). Rank {worst} on "
        f"{hosts[worst]} is the slowest in {counts[worst] / len(times):.0%} of them, and takes "
        f"{skew(times)[worst]:.2f} times the median; look at its GPU, its disk and its --workers."
    )
