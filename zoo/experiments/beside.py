"""Cells of an experiment side by side: processes on one device, each with the time's end."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from zoo.experiments.deadline import Deadline
from zoo.train.interrupt import Interrupted

T = TypeVar("T")
SILENCE = 30.0
"""Seconds after which the cells that run are told."""
_run: Callable[[Any], Any] | None = None
"""Of a worker process: what carries out a cell."""


class Stopped(KeyboardInterrupt):
    """A signal that means all processes came, and a worker has told it."""


def _begin(make: Callable[..., Callable[[Any], Any]], args: Sequence[Any], logs: Path) -> None:
    """Begin a worker: its lines go to a file, as several would mix; it ends with its parent."""
    global _run
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (logs / f"{os.getpid()}.log").open("w", buffering=1)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run = make(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(cell: Any, until: float | None) -> tuple[str, Any]:
    """Carry out a cell: `done` and what it found, `late` if the time was up, or `stopped`.

    Args:
        until: The end of the time by the clock on the wall.
    """
    assert _run is not None
    deadline = Deadline(None if until is None else until - time.time(), least=0)
    try:
        with deadline.stopping(), deadline:
            return "done", _run(cell)
    except (Interrupted, KeyboardInterrupt):
        return "stopped", None
    return "late", None


class Beside(Generic[T]):
    """Carries out cells in their order, several at a time.

    Args:
        jobs: Processes.
        make: Called in each of them with `args`: returns what carries out a cell. Both are sent
            to the processes.
        logs: Folder for what the processes print.
    """

    def __init__(
        self, jobs: int, make: Callable[..., Callable[[Any], T]], args: Sequence[Any], logs: Path
    ):
        context = multiprocessing.get_context("spawn")
        self.pools = [
            ProcessPoolExecutor(1, context, _begin, (make, args, logs)) for _ in range(jobs)
        ]

    def __enter__(self) -> "Beside[T]":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def run(
        self, cells: Sequence[Any], deadline: Deadline
    ) -> Iterator[tuple[Any, T | BaseException]]:
        """Yield each cell that has ended, with what it found or its error.

        Those for which the time was too short are passed over.

        Raises:
            Stopped: a signal that means all processes came.
        """
        left = deadline.left
        until = None if left is None else time.time() + left
        todo, running = list(cells), dict[Future, tuple[Any, int]]()
        free = list(range(len(self.pools)))
        while True:
            while free and todo and deadline.allows():
                number, cell = free.pop(0), todo.pop(0)
                running[self.pools[number].submit(_work, cell, until)] = cell, number
            if not running:
                return
            done = wait(running, timeout=SILENCE, return_when=FIRST_COMPLETED).done
            for future in done:
                cell, number = running.pop(future)
                free.append(number)
                if (error := future.exception()) is not None:
                    yield cell, error
                    continue
                how, found = future.result()
                if how == "stopped":
                    raise Stopped
                if how == "done":
                    yield cell, found
            if not done:
                names = ", ".join(cell.key for cell, _ in running.values())
                print(f"{deadline.spent:.0f} s: {names}", flush=True)
