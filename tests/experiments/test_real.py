import json
import signal
import time
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.sources import FolderSource
from zoo.experiments.deadline import Deadline
from zoo.experiments.real.cells import SEVERAL, Cell, cells, distillation
from zoo.experiments.real.config import RealExperiment, full
from zoo.experiments.real.controls import AllClasses, untrained
from zoo.experiments.real.result import compare, report


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise without labels, and two data sets with classes that a mean colour tells apart."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)

    def write(path, shade):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 100, (40, 48, 3)) + shade
        Image.fromarray(noise.astype(np.uint8)).save(path)

    for i in range(24):
        write(folder / "pool" / f"{i}.png", 60)
    for name, classes in (("shades", 2), ("greys", 3)):
        for c in range(classes):
            for split, count in (("train", 6), ("val", 3)):
                for i in range(count):
                    write(folder / name / split / f"c{c}" / f"{i}.png", 60 * c)
    return folder


def test_a_short_time_has_the_first_student_with_all_its_controls():
    order = list(cells(full()))
    first = full().students[0]
    assert [(c.student, c.arm, c.seed) for c in order[:5]] == [
        ("teachers", "teachers", 0),
        (first, "untrained", 0),
        (first, "phi_s", 0),
        (first, "labels", 0),
        (first, "none", 0),
    ]
    assert len({cell.key for cell in order}) == len(order) == 36
    starts = [cell.seed for cell in order if (cell.student, cell.arm) == (first, "untrained")]
    assert starts == list(range(full().seeds))  # each seed is held against its own start
    for student in full().students:  # no student stands without its controls
        arms = {cell.arm for cell in order if cell.student == student}
        assert {"phi_s", "labels", "none", "untrained"} <= arms


def test_arms_differ_in_what_they_learn_and_in_nothing_else():
    config = RealExperiment(data="photos", speed="plain")
    runs = [
        distillation(config, Cell("mambavision_t", arm), "rule:edges@64")
        for arm in ("phi_s", "none")
    ]
    found = [vars(run) | dict(normalise="", out="") for run in runs]
    assert found[0] == found[1] and len(runs[0].teachers) == 4
    several = distillation(config, Cell(config.resolved, SEVERAL), None)
    assert several.batches == (256, 256, 128, 64) and several.steps == 500
    one = distillation(config, Cell(config.resolved, "phi_s"), None)
    assert one.student_options == several.student_options == ("dynamic_img_size=True",)


def test_classes_of_several_data_sets_are_counted_one_after_the_other(pictures):
    parts = tuple(FolderSource.scan(pictures / name / "train") for name in ("shades", "greys"))
    joined = AllClasses(parts)
    labels = [joined.label(i) for i in range(len(joined))]
    assert labels == [c for c in range(5) for _ in range(6)] and len(joined.classes) == 5
    assert joined.read(12) == parts[1].read(0) and joined.key(12) == f"1/{parts[1].key(0)}"


def test_the_untrained_student_is_that_with_which_a_distillation_begins(pictures):
    from zoo.train.distill.setup import new_student, prepare

    config = RealExperiment(
        data=str(pictures / "pool"), teachers=("rule:edges@32",), students=("test_resnet",),
        resolved="test_resnet", size=32, sizes=(32,), batch=8, calibration=4, device="cpu",
    )  # fmt: skip
    cell = Cell("test_resnet", "phi_s", 3)
    begun = new_student(prepare(distillation(config, cell, None)), {}).backbone.state_dict()
    ours = untrained(config, cell).backbone.state_dict()
    assert all((ours[key] == begun[key]).all() for key in begun)


def test_at_a_deadline_what_ctrl_c_does_is_done(request):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a background job
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Deadline(0.05, least=45) as deadline, pytest.raises(KeyboardInterrupt):
        time.sleep(5)
    assert deadline.passed and not deadline.allows()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with Deadline(100.0, least=45) as deadline:
        assert deadline.allows()


def row(student, arm, seed, value, **more):
    values = {"knn/top1/x": value, "linear/top1/x": value + 1}
    return dict(student=student, arm=arm, seed=seed, values=values, parameters=10**6, **more)


def test_the_page_has_controls_seeds_and_sizes(tmp_path):
    trained = dict(steps=9, step_ms=1.0)
    sizes = {"32": {"knn/top1/x": 1.5, "linear/top1/x": 2.5}}
    rows = [row(f"big{i or ''}", "teacher", 0, 70.0 + i) for i in range(6)]
    for seed in (0, 1):
        rows += [row("a", "untrained", seed, 10.0 + seed)]
        rows += [row("a", "phi_s", seed, 50.0 + 2 * seed, by_size=sizes, **trained)]
        rows += [row("a", "labels", seed, 40.0 + seed, **trained)]
    gaps = compare(rows, ["knn/top1/x"])
    assert gaps["a", "labels"]["knn/top1/x"].mean == pytest.approx(10.5)
    start = gaps["a", "untrained"]["knn/top1/x"]  # of each seed its own
    assert (start.mean, start.count) == (pytest.approx(40.5), 2)
    lone = compare([r for r in rows if (r["arm"], r["seed"]) != ("untrained", 1)], ["knn/top1/x"])
    assert lone["a", "untrained"]["knn/top1/x"].count == 1
    config = dict(batch=4, size=32, rate=0.1, dense="gradients", teachers=["timm:big"])
    data = dict(images=9, labelled=dict(x=dict(classes=2, bank=8, tested=25)))
    about = dict(config=config, data=data, device="CPU", torch="2", left=["a-none-0"])
    report(rows, about, tmp_path)
    text, page = ((tmp_path / f"result.{e}").read_text() for e in ("md", "html"))
    assert "| a phi_s | 1.00 M | 9 | 51.0 ± 1.4 | 52.0 ± 1.4 | 1.0 | 2 |" in text
    assert (
        "| a - big | -19.0" in text
        and "| a, trained at one size | 32 | 1.5 ± 0.0 | 2.5 ± 0.0 |" in text
    )
    assert "up to 10.0 points" in text and "Not run yet: a-none-0." in text
    assert text.count("| a, trained at one size | 32 |") == 1  # its seeds together
    assert page.count("<table>") == text.count("## ") and "data:image/png" in page


def test_every_arm_and_every_teacher_is_in_the_figure():
    from matplotlib.figure import Figure

    from zoo.experiments.real.result import _paint_students

    arms = (
        "phi_s",
        "labels",
        "none",
        *get_args(get_args(get_type_hints(RealExperiment)["arms"])[0]),
    )
    rows = [row("a", arm, 0, 50.0) for arm in (*arms, SEVERAL, "untrained")]
    rows += [row(f"t{i}", "teacher", 0, 60.0 + i) for i in range(7)]
    panel = Figure().subplots()
    _paint_students(panel, rows, "knn/top1/x")
    labels = panel.get_legend_handles_labels()[1]
    assert set(labels) == {*arms, SEVERAL, "untrained", *(f"teacher t{i}" for i in range(7))}


@pytest.mark.slow
def test_the_experiment_runs_is_resumed_and_reports(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zoo.train.pretext.STEPS", 2)
    out = tmp_path / "real"
    words = ["experiment", "real", "--tiny", "--students", "test_resnet", "--resolved",
             "test_resnet", "--sizes", "64", "--data", str(pictures / "pool"),
             "--labelled", str(pictures / "shades"), str(pictures / "greys"),
             "--steps", "2", "--out", str(out)]  # fmt: skip
    assert not main([*words, "--dry-run"]) and not out.exists()
    assert "4. test_resnet-labels-0: 2 steps" in capsys.readouterr().out
    assert not main(words)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [r["arm"] for r in rows if r["arm"] != "teacher"] == [
        "teachers", "untrained", "phi_s", "labels", "none",
    ]  # fmt: skip
    assert set(rows[0]["values"]) == {
        f"{kind}/top1/{name}" for kind in ("knn", "linear") for name in ("shades", "greys")
    }
    assert rows[5]["fidelity"]["fidelity/gradients"] > 0
    assert not list(out.glob("work/*/checkpoints"))
    before = (out / "result.json").read_text()
    assert not main([*words, "--resume"])
    assert (out / "result.json").read_text() == before
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--batch", "4"])
    assert "was begun with --batch 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "name them with --data"),
        (["--data", "embedded/photos"], "--labelled"),
        (["--resolved", "resnet18"], "none of"),
        (["--sizes", "64", "--size", "96"], "not among them"),
        (["--arms", "pca", "pca"], "arms are pca, pca; give each once"),
    ],
)
def test_what_is_missing_is_said_before_any_work(words, error, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "real", *words, "--out", str(tmp_path / "out")])
    assert error in capsys.readouterr().err and not (tmp_path / "out").exists()
