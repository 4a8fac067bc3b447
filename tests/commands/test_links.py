"""`zoo bench links`: what it measures between two processes, and the line that it fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.commands.bench.args import main as bench
from zoo.commands.bench.collectives import MIB, RINGS, Row, figures, fit

ROOT = Path(__file__).parents[2]


def row(name: str, mib: int, seconds: float, ranks: int = 4) -> Row:
    return Row("within", name, ranks, mib, seconds)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("rate", "hop"), [(300.0, 5e-6), (12.5, 0.0)])
def test_the_line_of_rings_that_follow_one_is_found(ranks, rate, hop):
    """By hand: an all-reduce of S bytes sends 2 S (W - 1) / W in 2 (W - 1) hops, others half."""
    rows = [
        row(name, mib, turns * (ranks - 1) * (mib * MIB / ranks / rate / 1e9 + hop), ranks)
        for name, turns in (("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1))
        for mib in (1, 16, 256)
    ]
    assert fit(rows) == pytest.approx((rate, hop), abs=1e-12)
    assert fit([*rows, row("all-to-all", 1, 7.0, ranks)]) == fit(rows)
    assert rows[0].rate == pytest.approx(rows[0].sent / rows[0].seconds / 1e9)


@pytest.mark.parametrize("seconds", [(1e-3, 0.1), (0.1, 1e-3)])  # the second: noise alone
def test_a_delay_or_a_rate_below_nothing_is_none(seconds):
    rows = [row("all-gather", *one) for one in zip((1, 64), seconds, strict=True)]
    rate, hop = fit(rows)
    assert hop == 0
    slow, fast = sorted(one.rate for one in rows)
    assert slow <= rate <= fast


def test_only_what_was_measured_is_written():
    found = figures([row("all-gather", mib, 1e-3 * mib) for mib in (1, 4)], "a GPU")
    assert {"within", "hop_within"} <= found.keys()
    assert "between" not in found


def test_one_process_is_told_to_start_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        main(["bench", "links"])


def test_other_benchmarks_run_on_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="zoo bench data runs on one process"):
        bench(["data", "PHOTOS"])


@pytest.mark.parametrize(("nodes", "where"), [(1, {"within"}), (2, {"between"})])
def test_two_processes_measure_each_other(nodes, where, tmp_path):
    """As one node of two, and as two nodes of one."""
    out = tmp_path / "links.json"
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(2 // nodes)]
    words += ["--nnodes", str(nodes), "--master-addr", "localhost", "--master-port", "29437"]
    rest = ["-m", "zoo", "bench", "links", "--device", "cpu", "--most", "4", "--rounds", "3"]
    started = [
        subprocess.Popen([*words, "--node-rank", str(node), *rest, "--out", str(out)], env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for node in range(nodes)
    ]  # fmt: skip
    for one in started:
        _, err = one.communicate(timeout=300)
        assert one.returncode == 0, err[-3000:]
    found = json.loads(out.read_text())
    assert {one["where"] for one in found["rows"]} == where
    assert {one["name"] for one in found["rows"]} == {*RINGS, "all-to-all"}
    assert {one["mib"] for one in found["rows"]} == {1, 4}
    assert found[next(iter(where))] > 0
