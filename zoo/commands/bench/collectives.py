"""Collectives between ranks: their times, and rate and delay of a link that explain them."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

MIB = 2**20
RINGS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""Times that a ring goes around for each; the all-to-all is none, and is left out of the fit."""


class Row(NamedTuple):
    """A message that all ranks of a group exchange."""

    where: str
    """`within` a node or `between` nodes."""
    name: str
    ranks: int
    mib: int
    """Of the whole message."""
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that each rank sends."""
        return RINGS.get(self.name, 1) * self.mib * MIB * (self.ranks - 1) / self.ranks

    @property
    def rate(self) -> float:
        """GB/s that each rank sends."""
        return self.sent / self.seconds / 1e9


def measure_links(device: torch.device, *, most: int, rounds: int) -> list[Row]:
    """Time every collective at growing sizes; all ranks call this, and rank 0's times count."""
    rows = []
    for where, group in groups():
        size = dist.get_world_size(group)
        for name in (*RINGS, "all-to-all"):
            for mib in sizes(most):
                run = collective(name, mib * MIB // 4 // size * size, size, group, device)
                rows.append(Row(where, name, size, mib, timed(run, device, rounds)))
    return rows


def sizes(most: int) -> Iterable[int]:
    """Return sizes in MiB: 1, 4, 16 and so on."""
    return (4**power for power in range(16) if 4**power <= most)


def groups() -> Iterable[tuple[str, Any]]:
    """Return this rank's node, and the ranks of other nodes with its number; no group of one.

    A group is made by all ranks together, whether they are in it or not.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = [range(start, start + local) for start in range(0, world, local)]
    across = [range(first, world, local) for first in range(local)]
    for where, members in (("within", nodes), ("between", across)):
        mine = None
        for group in members:
            made = dist.new_group([*group]) if len(group) > 1 else None
            mine = made if rank in group else mine
        if mine is not None:
            yield where, mine


def collective(
    name: str, count: int, size: int, group: Any, device: torch.device
) -> Callable[[], object]:
    """Prepare a message of so many float32 numbers in all, for a group of `size` ranks."""
    whole, share = torch.ones(count, device=device), torch.ones(count // size, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, share, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(share, whole, group=group),
        "all-to-all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
    }
    return calls[name]


def timed(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a collective, after two that warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for number in range(rounds + 2):
        wait()
        began = time.perf_counter()
        run()
        wait()
        times.extend([time.perf_counter() - began] * (number > 1))
    return statistics.median(times)


def fit(rows: Sequence[Row]) -> tuple[float, float]:
    """Find the GB/s and the seconds of a hop with which rings take the times that were measured.

    A ring of W ranks has W - 1 hops, and takes bytes / rate + hops x delay. Each row counts by its
    relative error. Where noise would put either figure below 0, all time is taken for the bytes'.
    """
    counted = [row for row in rows if row.name in RINGS]
    hops = np.array([RINGS[row.name] * (row.ranks - 1) for row in counted])
    sent = np.array([row.sent for row in counted])
    seconds = np.array([row.seconds for row in counted])
    terms = np.stack([sent, hops], 1) / seconds[:, None]
    (byte, hop), *_ = np.linalg.lstsq(terms, np.ones(len(counted)), rcond=None)
    if byte <= 0 or hop < 0:
        byte, hop = 1 / np.mean(sent / seconds), 0.0
    return float(1 / byte / 1e9), float(hop)


def figures(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Return what `zoo plan --links` reads: rates in GB/s, delays in seconds, and where from."""
    found: dict[str, Any] = dict(
        how=f"measured {datetime.now(UTC):%Y-%m-%d} ({name}, torch {torch.__version__})"
    )
    for where in ("within", "between"):
        if mine := [row for row in rows if row.where == where]:
            found[where], found[f"hop_{where}"] = fit(mine)
    return found


def table(rows: Sequence[Row]) -> Table:
    """List the messages."""
    out = Table(title="Collectives: GB/s that a rank sends (ms)")
    out.add_column("")
    of_size: dict[int, dict[str, Row]] = {}
    for row in rows:
        of_size.setdefault(row.mib, {})[f"{row.name}\n{row.ranks} {row.where}"] = row
    heads = list(dict.fromkeys(head for found in of_size.values() for head in found))
    for head in heads:
        out.add_column(head, justify="right", overflow="fold")
    for mib, found in of_size.items():
        cells = (f"{found[head].rate:,.1f} ({1e3 * found[head].seconds:,.2f})" for head in heads)
        out.add_row(f"{mib:,} MiB", *cells)
    return out
