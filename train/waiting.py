"""How long steps wait for data, and how many workers would do."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")

NOTABLE = 0.1
"""Share of the time from which a person is told."""


class DataClock:
    """The seconds in which the device had nothing to do because the next batch was not there.

    On a GPU, whose work is queued, waiting for a batch costs nothing while it still computes: what
    counts is its time between the end of its work before and the batch, and no more than the host
    waited.

    Args:
        workers: Processes that read, as far as that is known.
    """

    def __init__(self, device: torch.device, workers: int | None = None):
        self.on_gpu, self.workers = device.type == "cuda", workers
        self._waits: list[tuple[float, Any, Any]] = []
        self._reports, self._advised = 0, False

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, and time how long each was waited for."""
        coming = iter(batches)
        while True:
            before, began = self._mark(), time.perf_counter()
            try:
                batch = next(coming)
            except StopIteration:
                return
            self._waits.append((time.perf_counter() - began, before, self._mark()))
            yield batch

    def read(self) -> float:
        """Return the seconds since this was last read; call it when the device is done."""
        waits, self._waits = self._waits, []
        if not self.on_gpu:
            return sum(seconds for seconds, _, _ in waits)
        if waits:
            waits[-1][2].synchronize()
        return sum(min(s, first.elapsed_time(last) / 1e3) for s, first, last in waits)

    def advice(self, waited: float) -> str | None:
        """Say once that reading is what limits a run on a GPU, and what would help; else `None`.

        Args:
            waited: Share of the time since the last report. The first, in which workers start,
                tells nothing.
        """
        self._reports += 1
        useful = self.on_gpu and self.workers is not None and self._reports > 1
        if not useful or self._advised or waited < NOTABLE:
            return None
        self._advised = True
        assert self.workers is not None
        return (
            f"Steps wait for data {waited:.0%} of the time, with {self.workers} workers; "
            f"--workers {workers_that_suffice(waited, self.workers)} would keep up, where there "
            "are as many cores. zoo bench data shows where an image's time goes."
        )

    def _mark(self) -> Any:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def workers_that_suffice(waited: float, workers: int) -> int:
    """Return how many workers would keep up with steps that waited for this share of the time.

    A step that never waited would take the rest of the time, in which the workers there are make
    that share of a batch. Without workers, the waiting is the reading itself.
    """
    left = max(1 - waited, 1e-3)
    return math.ceil((workers or waited) / left)
