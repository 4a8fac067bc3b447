"""The experiment's processes: cells in their order, side by side, as long as there is time."""

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any

import torch

from zoo.experiments.bookkeeping import append_row, begin_rows, device_name
from zoo.experiments.compression.cells import Bench, Cell, cells, teachers, tuned
from zoo.experiments.compression.config import CompressionExperiment
from zoo.experiments.compression.hybrid import build_hybrid
from zoo.experiments.compression.result import report
from zoo.train.run import Run

_bench: Bench | None = None
"""Of a worker process."""


def _begin(config: CompressionExperiment) -> None:
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
    """Runs cells in one process or several, until the time is up; keeps each row as it comes."""

    def __init__(self, config: CompressionExperiment, rows: list[dict[str, Any]]):
        self.config, self.rows, self.began = config, rows, time.perf_counter()
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}

    def run(self, wanted: Iterable[Cell], pool: ProcessPoolExecutor | None) -> None:
        """Run the cells that have no row yet."""
        done = {row["key"] for row in self.rows}
        coming = iter([cell for cell in wanted if cell.key not in done])
        if pool is None:
            bench = Bench(self.config)
            for cell in self._in_time(coming):
                self._keep(bench.run(cell))
            return
        running: dict[Future, Cell] = {}
        more = self._in_time(coming)
        while True:
            for cell in more:
                running[pool.submit(_work, cell)] = cell
                if len(running) == self.config.workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                if (error := future.exception()) is not None:
                    self.failed[cell.key] = repr(error)
                    print(f"FAILED {cell.key}: {error!r}")
                else:
                    self._keep(future.result())

    def _in_time(self, coming: Iterator[Cell]) -> Iterator[Cell]:
        """Yield cells; count those that may not end in time, by the time that their like took."""
        for cell in coming:
            took = [r["seconds"] for r in self.rows if _like(r) == _like(asdict(cell))]
            expected = statistics.median(took) if took else 0.0
            limit = 60 * (self.config.minutes or float("inf"))
            if time.perf_counter() - self.began + expected > limit:
                self.left_out.append(cell.key)
            else:
                yield cell

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        append_row(self.config.out / "rows.jsonl", row)
        ends = "  ".join(f"{size / 1e6:.3g} MB {bits:.4f}" for size, bits in row["curve"])
        print(f"{row['key']}: {ends}  ({row['seconds']:.1f} s)", flush=True)


def _like(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["arm"], row["rate"] > 0, row["way"].endswith("long")


def run(config: CompressionExperiment) -> dict[str, Any]:
    """Run the experiment, write its result to `config.out` and return it.

    Raises:
        ValueError: `config.out` exists and is not resumed, or was of another scale.
    """
    rows = begin_rows(config.out, resume=config.resume, same=dict(scale=config.scale))
    schedule, bench = Schedule(config, rows), Bench(config)
    about = dict(
        config=asdict(config),
        scale=asdict(config.sizes),
        corpus=bench.corpus.about,
        device=device_name(bench.device),
    )
    Run(config.out).write_json("about.json", json.loads(json.dumps(about, default=str)))
    context = multiprocessing.get_context("spawn")
    pool = (
        ProcessPoolExecutor(config.workers, context, _begin, (config,))
        if config.workers > 1
        else None
    )
    try:
        schedule.run(teachers(config), pool)
        have = {row["seed"] for row in rows if row["arm"] == "teacher"}
        wanted = (cell for cell in cells(config) if cell.seed in have)
        schedule.run(wanted, pool)
        schedule.run((cell for cell in tuned(config, rows) if cell.seed in have), pool)
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
        about |= dict(
            seconds=time.perf_counter() - schedule.began,
            left_out=schedule.left_out,
            failed=schedule.failed,
        )
        result = report(rows, about, config.out)
    return result


def main(config: CompressionExperiment) -> bool:
    """Run the experiment, and return True: what fails its rule is published, not an error."""
    run(config)
    return True


def plan(config: CompressionExperiment) -> None:
    """Print the models, the cells and their bytes; write nothing."""
    scale = config.sizes
    with torch.device("meta"):
        count = sum(p.numel() for p in build_hybrid(scale.shape).parameters())
    if not config.resume:
        Run.refuse_existing(config.out)
    grid = list(cells(replace(config, arms=tuple(dict.fromkeys(config.arms)))))
    print(f"teacher: {count / 1e6:.2f} M parameters, {scale.teacher_bytes / 1e6:g} MB, "
          f"{config.seeds} seeds")  # fmt: skip
    for arm in config.arms:
        mine = [cell for cell in grid if cell.arm == arm]
        learn = sum(cell.rate > 0 for cell in mine)
        extra = 6 * (config.seeds - 1) if arm == "students" else 0
        print(f"{arm}: {len(mine) + extra} cells, {learn + extra} of them trained")
    print("Nothing was written.")
