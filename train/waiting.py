"""How long steps wait for data, and how many workers would do."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")

NOTABLE = 0.1
"""Share of the time from which a person is told."""


class DataClock:
    """The seconds in which the device had nothing to do because the next batch was not there.

    On a GPU, whose work is queued, waiting for a batch costs nothing while it still computes: what
    counts is its time between the end of all work before and the batch (`idle`). Events in the
    queues tell, which cost a few microseconds and no waiting.

    Args:
        workers: Processes that read, as far as that is known.
        beside: A second stream whose work counts, that of teachers.
    """

    def __init__(
        self,
        device: torch.device,
        workers: int | None = None,
        beside: torch.cuda.Stream | None = None,
    ):
        self.on_gpu, self.workers, self.beside = device.type == "cuda", workers, beside
        self._waits: list[tuple[float, list[Any], list[Any]]] = []
        self._reports, self._advised = 0, False

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, and time how long each was waited for."""
        coming = iter(batches)
        while True:
            before, began = self._marks(), time.perf_counter()
            try:
                batch = next(coming)
            except StopIteration:
                return
            self._waits.append((time.perf_counter() - began, before, self._marks()[:1]))
            yield batch

    def read(self) -> float:
        """Return the seconds since this was last read; call it when the device is done."""
        waits, self._waits = self._waits, []
        if not self.on_gpu:
            return sum(seconds for seconds, _, _ in waits)
        for event in (event for _, before, after in waits[-1:] for event in (*before, *after)):
            event.synchronize()  # of the streams the last: all others are over as well
        return sum(idle(s, [e.elapsed_time(after[0]) / 1e3 for e in before])
                   for s, before, after in waits)  # fmt: skip

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

    def _marks(self) -> list[Any]:
        """Leave an event in each stream, that of the model first."""
        if not self.on_gpu:
            return []
        streams = [torch.cuda.current_stream(), *([self.beside] if self.beside else [])]
        events = [torch.cuda.Event(enable_timing=True) for _ in streams]
        for event, stream in zip(events, streams, strict=True):
            event.record(stream)
        return events


def idle(waited: float, since: Sequence[float]) -> float:
    """Return the seconds in which a device had no work while the host waited for a batch.

    Args:
        waited: By the host, in seconds.
        since: From the end of each stream's work before, to the batch on the device; below 0 where
            that work ended later. The copy of the batch is in it, and is no idle time: so no more
            than the host waited counts.
    """
    return max(0.0, min(waited, *since))


def workers_that_suffice(waited: float, workers: int) -> int:
    """Return how many workers would keep up with steps that waited for this share of the time.

    A step that never waited would take the rest of the time, in which the workers there are make
    that share of a batch. Without workers, the waiting is the reading itself.
    """
    left = max(1 - waited, 1e-3)
    return math.ceil((workers or waited) / left)
