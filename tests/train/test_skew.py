"""Who keeps the others waiting: percentiles by Python's statistics, and planted stragglers."""

import statistics

import numpy as np
import pytest
import torch

from zoo.train import skew
from zoo.train.skew import FEWEST, LIMIT, WARM_UP, StepClock, Stragglers, lateness


class Lines:
    """Takes what a progress would print."""

    def __init__(self):
        self.lines = []

    def print(self, text):
        self.lines.append(text)


def judged(times, monkeypatch, *, parts=4):
    """Report steps by ranks in several log intervals; return the lines and the last row."""
    lines, row = Lines(), {}
    judge = Stragglers(lines)  # pyright: ignore[reportArgumentType]
    for part in np.array_split(times, parts):
        ranks = [(f"node{r}", part[:, r].tolist()) for r in range(part.shape[1])]
        monkeypatch.setattr(skew, "gather", lambda _, ranks=ranks: ranks)
        row = judge.report(part[:, 0].tolist())
    return lines.lines, row


@pytest.mark.parametrize("seed", range(20))
def test_the_warning_comes_when_p99_is_more_than_the_limit_times_p50_and_not_otherwise(
    seed, monkeypatch
):
    draws = np.random.default_rng(seed)
    series = np.exp(draws.normal(0, draws.uniform(0.05, 0.2), FEWEST + 50))[:, None]
    lines, row = judged(np.concatenate([np.full((WARM_UP, 1), 9.0), series]), monkeypatch, parts=1)
    p99 = statistics.quantiles(series[:, 0], n=100, method="inclusive")[98]
    ratio = p99 / statistics.median(series[:, 0])
    assert row["p99_p50"] == pytest.approx(ratio, abs=1e-3)
    assert len(lines) == (ratio > LIMIT)


def test_both_verdicts_occur_among_those_series():
    spread = [np.exp(np.random.default_rng(0).normal(0, s, (150, 1))) for s in (0.05, 0.2)]
    assert lateness(spread[0]) < LIMIT < lateness(spread[1])


def test_one_rank_in_many_that_is_always_slow_is_named_with_its_node_once(monkeypatch):
    times = np.ones((WARM_UP + 400, 64)) * (1 + 0.01 * np.random.default_rng(0).random((410, 64)))
    lines, row = judged(times, monkeypatch)
    assert lines == [] and max(row["skew"]) < 1.02
    times[:, 37] *= 1.5
    lines, row = judged(times, monkeypatch)
    assert len(lines) == 1 and "Rank 37 on node37 is the slowest in 100%" in lines[0]
    assert row["skew"][37] == pytest.approx(1.5, abs=0.02) and len(row["skew"]) == 64


def test_one_hiccup_is_no_straggler_and_neither_are_the_first_steps(monkeypatch):
    times = np.ones((WARM_UP + 300, 4))
    times[:WARM_UP] = 30
    times[WARM_UP + 70, 2] = 50
    assert judged(times, monkeypatch)[0] == []


def test_it_warns_again_only_after_it_was_well_in_between(monkeypatch):
    even, late = np.ones((500, 2)), np.ones((500, 2)) * [1.0, 2.0]
    times = np.concatenate([even, late, late, even, late])
    assert len(judged(times, monkeypatch, parts=5)[0]) == 2


def test_the_clock_counts_until_the_last_backward_pass_of_each_step(monkeypatch):
    moments = iter([10.0, 11.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(skew.time, "perf_counter", lambda: next(moments))
    clock = StepClock(torch.device("cpu"))
    clock.begin()
    clock.end()
    clock.end()  # of the second slice
    clock.begin()
    clock.end()
    assert clock.read() == [2.5, 0.25] and clock.read() == []


def test_steps_in_which_a_rank_compiles_are_judged_on_none(monkeypatch):
    clock = StepClock(torch.device("cpu"))
    for counts in (True, False, True):
        clock.begin()
        clock.end(counts=counts)
    assert np.isnan(clock.read()).tolist() == [False, True, False]
    times = np.ones((WARM_UP + FEWEST + 1, 2))
    times[40] = np.nan, 60.0
    lines, row = judged(times, monkeypatch)
    assert lines == [] and row == dict(skew=[1.0, 1.0], p99_p50=1.0)
