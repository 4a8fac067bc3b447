"""Whether compiling pays: the pace of the first steps, and the seconds from which it does."""

import json
from pathlib import Path

import pytest
import torch

from zoo.train.distill import worth
from zoo.train.distill.worth import COLD, SETTLING, TIMED, WARM, Pace, too_short

RUN = Path(__file__).parents[3] / "benchmarks" / "results" / "distill-speed-h200-2026-12-02.json"


def test_the_pace_is_the_median_of_the_steps_after_the_first_ones(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(worth.time, "perf_counter", lambda: now[0])
    pace = Pace(torch.device("cpu"), 100)  # resumed
    for step in range(100, 100 + SETTLING + TIMED + 1):
        assert pace.seconds() is None
        pace.saw(step)
        pace.saw(step)  # of another slice
        now[0] += 30.0 if step < 100 + SETTLING else 0.25
        now[0] += 5.0 * (step == 100 + SETTLING + 2)  # an evaluation
    assert pace.seconds() == pytest.approx(0.25)


def test_what_is_left_is_weighed_not_what_a_run_has_in_all():
    assert too_short(0.1, 300, warm=False) and too_short(0.1, 300, warm=True)
    assert "300 steps left" in (too_short(0.1, 300, warm=True) or "")
    assert too_short(0.1, int(COLD / 0.1) + 1, warm=False) is None
    assert too_short(0.1, int(WARM / 0.1) + 1, warm=True) is None


def test_the_seconds_lie_a_little_above_where_the_measured_runs_were_even():
    runs = json.loads(RUN.read_text())
    plain, steps = runs["mamba plain"], 300
    reports = plain["reports"]
    step = (reports[-1][2] - reports[0][2]) / (reports[-1][0] - reports[0][0])
    for form, least in (("cold", COLD), ("warm", WARM)):
        run = runs[f"mamba {form}"]
        fast = 256 / run["images_per_s"]
        later = run["trained"] - plain["trained"]  # after as many steps
        even = steps + later / (step - fast)
        assert even * step < least < 1.6 * even * step
