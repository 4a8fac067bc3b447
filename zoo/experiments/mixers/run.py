"""The experiment's processes: each trains its towers, seed by seed, as long as there is time."""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from zoo.experiments.bookkeeping import append_row, begin_rows, device_name
from zoo.experiments.deadline import Deadline
from zoo.experiments.mixers.cells import Bench, Cell, folder, speeds, trainings
from zoo.experiments.mixers.config import MixersExperiment
from zoo.experiments.mixers.result import report
from zoo.experiments.mixers.towers import build, count
from zoo.train.interrupt import Interrupted
from zoo.train.run import Run

KEPT = ("scale", "tiny", "megabytes", "tasks", "weight", "growing", "rate", "precision")
"""Fields in which a resumed run is as it was begun."""
LEAST_SECONDS = 20.0
"""With less time left no training is begun: its layers are still to be compiled."""
SILENCE = 20.0
"""Seconds after which the processes' progress is told."""
STOPPED = "stopped"
_bench: Bench | None = None
"""Of a worker process."""


def _begin(config: MixersExperiment) -> None:
    """Begin a worker: its lines go to a file, as several would mix; it ends with its parent."""
    global _bench
    logs = config.out / "workers"
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (logs / f"{os.getpid()}.log").open("w", buffering=1)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _bench = Bench(config)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(cell: Cell, until: float | None) -> dict[str, Any] | str | None:
    """Run a cell; return nothing if the time was up, at `until` by the clock on the wall.

    After a signal that means all processes it returns `STOPPED`: an exception that stops a run
    would be told as one of the cell.
    """
    assert _bench is not None
    left = None if until is None else until - time.time()
    deadline = Deadline(left, least=0)
    try:
        with deadline.stopping(), deadline:
            return _bench.run(cell)
    except (Interrupted, KeyboardInterrupt):
        return STOPPED
    return None


class Schedule:
    """Runs cells until the time is up, and keeps each row as it comes."""

    def __init__(self, config: MixersExperiment, rows: list[dict[str, Any]]):
        self.config, self.rows = config, rows
        self.deadline = Deadline(config.seconds, least=LEAST_SECONDS)
        self.failed: dict[str, str] = {}

    def missing(self, wanted: Iterable[Cell]) -> list[Cell]:
        """Return the cells that have no row yet."""
        done = {row["key"] for row in self.rows}
        return [cell for cell in wanted if cell.key not in done]

    def run(self, wanted: Iterable[Cell]) -> None:
        """Run the cells that have no row yet, in this process."""
        missing = self.missing(wanted)
        if not missing or not self.deadline.allows():
            return
        bench = Bench(self.config)
        with self.deadline.stopping(), self.deadline:
            for cell in missing:
                if not self._in_time(cell):
                    continue
                try:
                    self._keep(bench.run(cell))
                except Interrupted:
                    raise
                except Exception as error:  # the other cells still count
                    traceback.print_exc()
                    self._fail(cell, error)

    def run_beside(self, wanted: Iterable[Cell], pools: Sequence[ProcessPoolExecutor]) -> None:
        """Run them in several processes, a tower's in one of these, which compiles it once."""
        missing = self.missing(wanted)
        towers = {tower: i % len(pools) for i, tower in enumerate(self.config.towers)}
        queues = [[c for c in missing if towers[c.tower] == i] for i in range(len(pools))]
        running: dict[Future, tuple[Cell, int]] = {}
        self._submit(range(len(pools)), queues, pools, running)
        while running:
            free = []
            done = wait(running, timeout=SILENCE, return_when=FIRST_COMPLETED).done
            for future in done:
                cell, number = running.pop(future)
                free.append(number)
                if (error := future.exception()) is not None:
                    self._fail(cell, error)
                elif (row := future.result()) == STOPPED:
                    raise KeyboardInterrupt
                elif row:
                    self._keep(row)
            self._submit(free, queues, pools, running)
            if not done:
                now = ", ".join(self._progress(cell) for cell, _ in running.values())
                print(f"{self.deadline.spent:.0f} s: {now}", flush=True)

    def _submit(
        self,
        free: Iterable[int],
        queues: Sequence[list[Cell]],
        pools: Sequence[ProcessPoolExecutor],
        running: dict[Future, tuple[Cell, int]],
    ) -> None:
        left = self.deadline.left
        until = None if left is None else time.time() + left
        for number in free:
            while queues[number] and self.deadline.allows():
                cell = queues[number].pop(0)
                running[pools[number].submit(_work, cell, until)] = cell, number
                break

    def _progress(self, cell: Cell) -> str:
        timing = folder(self.config, cell.key) / "timing.jsonl"
        lines = timing.read_text().splitlines() if timing.is_file() else []
        done = json.loads(lines[-1])["step"] if lines else 0
        return f"{cell.key} {done}/{self.config.steps}"

    def _in_time(self, cell: Cell) -> bool:
        """Tell whether a cell may begin: a timing must end in time, by the tower's last one."""
        took = [
            row["seconds"] for row in self.rows if row["tower"] == cell.tower and row["context"]
        ]
        expected = took[-1] if cell.context and took else 0.0
        left = self.deadline.left
        return self.deadline.allows() and (left is None or expected <= left)

    def _fail(self, cell: Cell, error: BaseException) -> None:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        self.failed[cell.key] = text
        print(f"FAILED {cell.key}: {text}", flush=True)

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        append_row(self.config.out / "rows.jsonl", row)
        shutil.rmtree(folder(self.config, row["key"]), ignore_errors=True)
        if row["context"]:
            found = f"{row['tokens_a_second']:,.0f} tokens/s"
        else:
            recalled = (
                f"{task} {row['recalled'][f'{task}/inside/exact']:.1f} %"
                for task in ("phonebook", "copying")
            )
            found = f"{row['curve'][-1][1]:.4f} bits a byte, {', '.join(recalled)}"
        print(f"{row['key']}: {found}  ({row['seconds']:.1f} s)", flush=True)


def run(config: MixersExperiment) -> dict[str, Any]:
    """Run the experiment, write its result to `config.out` and return it.

    Raises:
        ValueError: `config.out` exists and is not resumed, or was of another scale.
    """
    kept = {name: getattr(config, name) for name in KEPT}
    rows = begin_rows(config.out, resume=config.resume, same=kept)
    for row in rows:  # what a killed call left of them
        shutil.rmtree(folder(config, row["key"]), ignore_errors=True)
    schedule, bench = Schedule(config, rows), Bench(config)
    about: dict[str, Any] = dict(
        config=json.loads(json.dumps(asdict(config), default=str)),
        scale=asdict(config.sizes),
        corpus=bench.corpus.about,
        device=device_name(bench.device),
        torch=torch.__version__,
    )
    Run(config.out).write_json("about.json", about)
    try:
        with _pools(config) as pools:
            train = partial(schedule.run_beside, pools=pools) if pools else schedule.run
            first = [cell for cell in trainings(config) if not cell.seed]
            train(first if "train" in config.parts else ())
            schedule.run(speeds(config) if "speed" in config.parts else ())  # nobody else computes
            train(trainings(config) if "train" in config.parts else ())
    finally:
        about |= dict(
            seconds=schedule.deadline.spent,
            left_out=[cell.key for cell in schedule.missing(wanted(config))],
            failed=schedule.failed,
        )
        result = report(rows, about, config.out)
        with suppress(OSError):
            (config.out / "cells").rmdir()  # if nothing waits in it
        if about["left_out"]:
            print(f"{len(about['left_out'])} cells are left: --resume goes on")
    return result


@contextmanager
def _pools(config: MixersExperiment) -> Iterator[list[ProcessPoolExecutor]]:
    """Within this context there are processes of one worker each; none if one is enough."""
    context = multiprocessing.get_context("spawn")
    number = min(config.workers, len(config.towers)) if config.workers > 1 else 0
    pools = [ProcessPoolExecutor(1, context, _begin, (config,)) for _ in range(number)]
    try:
        yield pools
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


def wanted(config: MixersExperiment) -> Iterator[Cell]:
    """Yield all cells that this call is to run."""
    if "train" in config.parts:
        yield from trainings(config)
    if "speed" in config.parts:
        yield from speeds(config)


def main(config: MixersExperiment) -> bool:
    """Run the experiment, and return True: what fails its rule is published, not an error."""
    run(config)
    return True


def plan(config: MixersExperiment) -> None:
    """Print the towers, the cells and their bytes; write nothing."""
    if not config.resume:
        Run.refuse_existing(config.out)
    scale = config.sizes
    for tower in config.towers:
        with torch.device("meta"):
            print(f"{tower}: {count(build(tower, scale)) / 1e6:.3f} M parameters")
    size = config.steps * scale.batch * scale.length / 1e6
    one = replace(config, seeds=1)
    print(f"{config.seeds} seeds of {len(list(trainings(one)))} trainings: {config.steps} steps, "
          f"{size:.3g} MB each, {config.tasks:.0%} of the rows drills")  # fmt: skip
    print(f"speed behind {', '.join(map(str, scale.contexts))} tokens, {scale.texts} texts")
    print("Nothing was written.")
