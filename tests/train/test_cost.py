"""The cost model of a step."""

import json
from pathlib import Path

import pytest

from zoo.train.cost import EIGHT_BITS, estimate, share

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TRIO = {"clip": ("vit_huge_patch14_clip_378", 1.007e12), "dino": ("vit_giant_patch14", 0.608e12)}


def test_the_total_is_the_sum_of_its_parts():
    found = estimate(TRIO, ("vit_base_patch16_224", 0.145e12), 790e12)
    assert found.total == pytest.approx(sum(found.teachers.values()) + found.student)


RUNS = [
    run
    for name in ("distill-*h200-*.json", "held-out-h200-2026-12-02.json")
    for file in sorted(RESULTS.glob(name))
    if "rows" in (run := json.loads(file.read_text()))  # whole runs of the command have none
]
ROWS = [(row, run["matmul_tflops"]) for run in RUNS for row in run["rows"]]


def ratio(row, tflops) -> float:
    """Return the estimated time of a step over the measured one."""
    flops, told = {k: 1e9 * v for k, v in row["gflops"].items()}, row["fidelity"]
    (student,) = {row["student"]} & flops.keys()
    found = estimate(
        {name: (name, f) for name, f in flops.items() if name != student},
        (student, flops[student]),
        1e12 * tflops,
        compiled=row["compiled"],
        precision=row["precision"],
        eight={label: one["share"] for label, one in told.items()} if told else None,
    )
    return 1e3 * found.total / row["milliseconds"]


def test_steps_that_constants_were_fitted_to_come_back_within_5_percent():
    """In-sample: it holds the fit, and says nothing of a step that was not measured."""
    found = {row["name"]: ratio(row, tflops) for row, tflops in ROWS}
    assert len(found) == 9
    assert found == {name: pytest.approx(1, abs=0.05) for name in found}


def test_steps_that_no_constant_has_met_are_within_20_percent_of_the_estimate():
    """Two of the kind of `c_radio_v4`, measured after the constants were committed."""
    files = sorted(RESULTS.glob("held-out-*-h200-2026-12-03.json"))
    runs = [json.loads(file.read_text()) for file in files]
    found = [ratio(row, run["matmul_tflops"]) for run in runs for row in run["rows"]]
    assert found == [pytest.approx(1, abs=0.2)] * 2


def test_8_bits_gain_on_the_part_of_the_work_that_they_do():
    student = ("vit_base", 1e11)
    plain = estimate(TRIO, student, 790e12)
    half = estimate(TRIO, student, 790e12, precision="fp8", eight=dict(clip=0.5))
    full = 1 / EIGHT_BITS["fp8"]
    assert half.teachers["clip"] == pytest.approx(plain.teachers["clip"] * (0.5 + 0.5 * full))
    assert half.teachers["dino"] == pytest.approx(plain.teachers["dino"] * full)
    assert half.student == plain.student


def test_the_longest_name_that_fits_counts():
    assert share({"": 1.0, "vit": 2.0, "vit_huge": 3.0}, "vit_huge_patch14") == 3.0
    assert share({"": 1.0, "vit": 2.0}, "resnet18") == 1.0
