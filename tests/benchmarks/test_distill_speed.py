"""The GPU script of `zoo distill`: which jobs it does, when a run ends, what it reports."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    names = ("distill_speed", "distill_report")
    yield [importlib.import_module(name) for name in names]
    sys.path[:] = before
    for name in (*names, "distill_parts"):
        sys.modules.pop(name, None)


def run(rate=1000.0, losses=(), **more):
    return dict(
        images_per_s=rate, images_per_s_mean=rate, to_95=9, first=5, ended=20, waited=0.01,
        peak_gib=2.0, reserved_gib=3.0, speed=dict(form="channels last", compiled_from=[13]),
        losses=losses, seconds=30, **more,
    )  # fmt: skip


def test_a_report_says_efficiency_gaps_memory_and_spread(scripts):
    parts = dict(student=dict(eager=90.0, graphs=40.0), a=dict(eager=30.0), resize=dict(it=5.0))
    curve = [(step, 2.0) for step in range(5, 305, 5)]
    done = {
        "mamba:auto": run(2560.0, [(s, 2.02 if s == 100 else x) for s, x in curve]),
        "mamba:plain": run(1280.0, curve) | dict(peak_gib=1.6),
        "mamba:parts": dict(parts=parts),
        "mamba:spread": dict(seconds=1, runs=[run(losses=[(5, x)]) for x in (1.0, 1.1, 1.05, 1.2)]),
    }
    lines = "\n".join(scripts[1].report(done, scripts[0].ROWS))
    assert "models alone 70.0 ms / step 100.0 ms = 0.700" in lines  # 256 images at 2,560 a second
    assert "0.750" in lines and "2.00 x plain" in lines and "peak 1.25 x plain's" in lines
    assert "largest gap to plain 1.00% (step 100)" in lines and "0.00% at the end" in lines
    assert "(spread 0.10000), killed and resumed 1.20000: NOT within" in lines


@pytest.mark.parametrize(
    ("form", "taken", "ends"),
    [
        ("plain, at first", [], None),
        ("plain (the steps left take 9 s)", [], 65),
        ("channels last, student compiled", [], None),
        ("channels last, student compiled", [20], 80),
    ],
)
def test_a_run_is_ended_when_its_final_form_was_seen(
    scripts, tmp_path, monkeypatch, form, taken, ends
):
    monkeypatch.setenv("ZOO_BEGAN", "0")
    (tmp_path / "about.json").write_text(
        json.dumps(dict(speed=dict(form=form, compiled_from=taken)))
    )
    watch, ended = scripts[0].Watch(tmp_path, until=30, shown=60), []
    monkeypatch.setattr(watch, "end", lambda speed, first: ended.append(step))
    for step in range(5, 200, 5):
        watch.reports.append(dict(step=step))
        watch.look(step)
    assert (ended or [None])[0] == ends


def test_a_job_that_does_not_fit_is_not_begun_and_one_that_is_known_is_not_done_again(
    scripts, tmp_path, monkeypatch, capsys
):
    script, begun = scripts[0], []
    monkeypatch.setattr(script, "photos", lambda count: tmp_path)
    monkeypatch.setattr(
        script, "run_child", lambda n, f, args, limit: begun.append((n, f)) or run()
    )
    out, words = tmp_path / "o.json", ["--work", str(tmp_path), "--log", str(tmp_path / "l")]
    out.write_text(json.dumps({"mamba:plain": run(), "mamba:auto": dict(error="killed")}))
    jobs = ["mamba:plain", "mamba:auto", "trio:cold", "mamba:dry,vit:dry"]
    monkeypatch.setattr(sys, "argv", ["x", *jobs, "--out", str(out), "--seconds", "100", *words])
    script.main()
    assert begun[0] == ("mamba", "auto") and sorted(begun[1:]) == [("mamba", "dry"), ("vit", "dry")]
    assert "trio:cold: not begun" in capsys.readouterr().out
    assert "error" not in json.loads(out.read_text())["mamba:auto"]
