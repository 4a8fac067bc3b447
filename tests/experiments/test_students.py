import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.experiments.bookkeeping import step_ms
from zoo.experiments.students.config import FAMILIES
from zoo.experiments.students.result import compare, report
from zoo.students.build import build_student
from zoo.train.run import Run


@pytest.mark.slow
def test_the_students_of_all_families_are_of_about_one_size():
    for name, options in FAMILIES.values():
        student = build_student(name, {}, size=96, options=options, device="meta")
        assert 5.0e6 < sum(p.numel() for p in student.parameters()) < 5.9e6, name


def row(family, way, seed, value):
    found = {"knn/top1/x": value, "linear/top1/x": value + 1, "parameters": 5_000_000}
    if way == "distilled":
        found |= {"fidelity/t": 2.0, "fidelity/min": 2.0}
    return dict(family=family, way=way, seed=seed, step_ms=1.0, **found)


def test_the_page_has_every_seed_and_the_paired_gap(tmp_path):
    rows = [row("teacher", "supervised", 0, 60.0)]
    rows += [
        row("vit", w, s, v + s) for w, v in (("distilled", 50.0), ("alone", 45.0)) for s in (0, 1)
    ]
    gaps = compare(rows, ["knn/top1/x"])["vit"]["knn/top1/x"]
    assert gaps.mean == pytest.approx(5) and gaps.wins == 2
    about = dict(config=dict(steps=9, batch=4, size=64), steps=9, seconds=1.0)
    report(rows, about, tmp_path)
    page = (tmp_path / "result.md").read_text()
    assert "| vit alone | 1 | 46.0 | 47.0 |" in page and "| vit - supervised | -9.5" in page
    assert (tmp_path / "students.svg").stat().st_size > 5000


def test_an_interrupted_run_reports_what_it_has(tmp_path):
    about = dict(config=dict(steps=9, batch=4, size=64), seconds=1.0)
    report(
        [row("teacher", "supervised", 0, 60.0), row("vit", "distilled", 0, 50.0)], about, tmp_path
    )
    assert "vit distilled" in (tmp_path / "result.md").read_text()


@pytest.mark.parametrize(("seconds", "ms"), [([3.0], 300.0), ([3.0, 0.1, 0.3], 20.0)])
def test_the_time_of_a_step_leaves_out_those_before_the_first_line(seconds, ms, tmp_path):
    run = Run(tmp_path)
    for line, value in enumerate(seconds, 1):
        run.log_speed(10 * line, 1.0, value)
    assert step_ms(run) == pytest.approx(ms)


@pytest.mark.slow
def test_the_tiny_experiment_runs_on_two_data_sets_and_says_how_far_it_is(tmp_path, capsys):
    draws = np.random.default_rng(0)
    folders = []
    for name in ("first", "second"):
        for split in ("train", "val"):
            for number in range(2):
                place = tmp_path / name / split / f"c{number}"
                place.mkdir(parents=True)
                for i in range(6):
                    pixels = draws.integers(0, 120, (8, 8, 3)) + 120 * number
                    Image.fromarray(pixels.astype(np.uint8)).resize((48, 48)).save(
                        place / f"{i}.png"
                    )
        folders += ["--data", str(tmp_path / name)]
    out = tmp_path / "run"
    options = ["--device", "cpu", "--families", "vit", "eradio", "--seeds", "1", "--steps", "4"]
    main(["experiment", "students", "--tiny", *folders, "--out", str(out), *options])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(r["family"], r["way"]) for r in rows[3:]] == [
        (f, w) for f in ("vit", "eradio") for w in ("distilled", "alone")
    ]
    assert all("linear/top1/second" in r for r in rows)
    assert torch.isfinite(torch.tensor(rows[3]["fidelity/geomean"])) and rows[3]["step_ms"] > 0
    shown = capsys.readouterr().err
    assert re.search(r"vit distilled seed 0 4/4 .* loss .* supervised/spatial .* ETA 0 s", shown)
    lines = (out / "training/vit-alone-0/metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    assert [log["step"] for log in logs] == [1, 2, 3, 4] and "labels" in logs[0]
    assert not list(out.rglob("checkpoints"))
