"""The script that trains detectors on few images, on a CPU and tiny models."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "detect_few.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("detect_few", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["detect_few"] = module
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def row(model, seed, value):
    scores = {
        f"{part}/{kind}/AP50{rest}": value
        for part in ("train", "val")
        for kind in ("box", "mask")
        for rest in ("", " any class")
    }
    return dict(
        model=model, seed=seed, weights="random", parameters=dict(backbone=2e6, detector=5e6),
        scores=scores, losses=[4.0] * 10 + [1.0] * 10, steps=20, step_seconds=0.1,
    )  # fmt: skip


def test_the_table_has_means_and_spreads_over_seeds_and_names_failures(script):
    failed = dict(model="other", seed=1, error="ValueError: no")
    lines = script.table_of([row("mine", 0, 10.0), row("mine", 1, 14.0), failed]).splitlines()
    assert "12.0 ± 2.8" in lines[2]
    assert "4.00 → 1.00" in lines[2]
    assert lines[-1] == "other seed 1: ValueError: no"


def test_a_failure_is_a_row(script, tmp_path):
    job = script.Job("x", script.Detect(backbone="no_such_model", data=str(tmp_path)), None)
    assert "no COCO split" in script.run(job)["error"]


@pytest.mark.slow
def test_the_rehearsal_measures_draws_and_writes(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it is in [train]")
    out = tmp_path / "few.json"
    words = ["--tiny", "--device", "cpu", "--seeds", "1", "--models", "mine=eradio_nano"]
    subprocess.run([sys.executable, SCRIPT, *words, "--out", out], check=True, capture_output=True)
    (found,) = json.loads(out.read_text())["rows"]
    assert found["model"] == "mine"
    assert len(found["losses"]) == 6
    assert {"train/box/AP50", "val/mask/AP50 any class"} <= set(found["scores"])
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "| mine |" in out.with_suffix(".md").read_text()
    assert list((tmp_path / "few").glob("mine-val-*.jpg"))
