"""The GPU script of the engine, on a CPU and tiny models."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "distill_engine.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("distill_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_list_measures_nothing(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill_engine.py", "--list", "--rows", "a", "c"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "c"]


def test_every_pair_that_is_compared_is_measured(script):
    names = [step.name for step in script.STEPS]
    assert len(set(names)) == len(names)
    assert {name for pair in script.PAIRS for name in pair} <= set(names)


@pytest.mark.slow
def test_a_rehearsal_writes_what_it_measured_and_names_what_it_did_not(
    script, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run.json"
    command = ["x", "--tiny", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "c", "b-int8"])
    script.main()
    run = json.loads(out.read_text())
    assert [row["error"] for row in run["rows"]] == [None, None]
    assert run["mosaic"]["times_cheaper"] > 1 and run["mosaic"]["border_effect_same"]["inner"] > 0
    assert run["rows"][1]["fidelity"]
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "a", "--seconds", "0"])
    script.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["error"] == "not run: the 0 s were over"
    assert "not run" not in capsys.readouterr().err
