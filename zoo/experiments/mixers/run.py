"""The experiment's processes: each trains its towers, seed by seed, as long as there is time."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any

import torch

from zoo.experiments.bookkeeping import append_row, begin_rows, device_name
from zoo.experiments.mixers.cells import Bench, Cell, speeds, trainings
from zoo.experiments.mixers.config import MixersExperiment
from zoo.experiments.mixers.result import report
from zoo.experiments.mixers.towers import build, count
from zoo.train.run import Run

KEPT = ("scale", "megabytes", "tasks", "rate", "precision")
"""Fields in which a resumed run is as it was begun."""
_bench: Bench | None = None
"""Of a worker process."""


def _begin(config: MixersExperiment) -> None:
    """Begin a worker: its lines go to a file, as several would mix."""
    global _bench
    folder = config.out / "workers"
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder / f"{os.getpid()}.log").open("w", buffering=1)
    torch.set_num_threads(1)
    _bench = Bench(config)


def _work(cell: Cell) -> dict[str, Any]:
    assert _bench is not None
    return _bench.run(cell)


class Schedule:
    """Runs cells until the time is up, and keeps each row as it comes."""

    def __init__(self, config: MixersExperiment, rows: list[dict[str, Any]]):
        self.config, self.rows, self.began = config, rows, time.perf_counter()
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}

    def run(self, wanted: Iterable[Cell], pools: Sequence[ProcessPoolExecutor]) -> None:
        """Run the cells that have no row yet; a tower's in one process, which compiles it once."""
        done = {row["key"] for row in self.rows}
        missing = [cell for cell in wanted if cell.key not in done]
        if not pools:
            bench = Bench(self.config)
            for cell in missing:
                if self._in_time(cell):
                    self._keep(bench.run(cell))
            return
        towers = {tower: i % len(pools) for i, tower in enumerate(self.config.towers)}
        queues = [[c for c in missing if towers[c.tower] == i] for i in range(len(pools))]
        running: dict[Future, tuple[Cell, int]] = {}
        self._submit(range(len(pools)), queues, pools, running)
        while running:
            free = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, number = running.pop(future)
                free.append(number)
                if (error := future.exception()) is not None:
                    self.failed[cell.key] = repr(error)
                    print(f"FAILED {cell.key}: {error!r}", flush=True)
                else:
                    self._keep(future.result())
            self._submit(free, queues, pools, running)

    def _submit(
        self,
        free: Iterable[int],
        queues: Sequence[list[Cell]],
        pools: Sequence[ProcessPoolExecutor],
        running: dict[Future, tuple[Cell, int]],
    ) -> None:
        for number in free:
            while queues[number]:
                cell = queues[number].pop(0)
                if self._in_time(cell):
                    running[pools[number].submit(_work, cell)] = cell, number
                    break

    def _in_time(self, cell: Cell) -> bool:
        """Tell whether a cell may end in time, by what the tower's last one took."""
        like = [
            row["seconds"]
            for row in self.rows
            if row["tower"] == cell.tower and bool(row["context"]) == bool(cell.context)
        ]
        expected = like[-1] if like else 0.0
        fits = time.perf_counter() - self.began + expected <= (self.config.seconds or float("inf"))
        if not fits:
            self.left_out.append(cell.key)
        return fits

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        append_row(self.config.out / "rows.jsonl", row)
        if row["context"]:
            found = f"{row['tokens_a_second']:,.0f} tokens/s"
        else:
            recalled = (
                f"{n} {row['recalled'][n]:.1f} %" for n in ("phonebook/exact", "copying/exact")
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
    schedule, bench = Schedule(config, rows), Bench(config)
    about: dict[str, Any] = dict(
        config=json.loads(json.dumps(asdict(config), default=str)),
        scale=asdict(config.sizes),
        corpus=bench.corpus.about,
        device=device_name(bench.device),
        torch=torch.__version__,
    )
    Run(config.out).write_json("about.json", about)
    context = multiprocessing.get_context("spawn")
    number = min(config.workers, len(config.towers)) if config.workers > 1 else 0
    pools = [ProcessPoolExecutor(1, context, _begin, (config,)) for _ in range(number)]
    try:
        schedule.run((cell for cell in trainings(config) if not cell.seed), pools)
        schedule.run(speeds(config), ())  # while nobody else computes
        schedule.run(trainings(config), pools)
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        about |= dict(
            seconds=time.perf_counter() - schedule.began,
            left_out=list(dict.fromkeys(schedule.left_out)),
            failed=schedule.failed,
        )
        result = report(rows, about, config.out)
    return result


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
          f"{size:.3g} MB each, {config.tasks:.0%} of the rows tasks")  # fmt: skip
    print(f"speed behind {', '.join(map(str, scale.contexts))} tokens, {scale.texts} texts")
    print("Nothing was written.")
