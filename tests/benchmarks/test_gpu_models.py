"""The GPU script's plumbing, on a CPU and tiny images."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from zoo.eval.speed.cost import name_and_options
from zoo.eval.speed.models import Case, Measured

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "gpu_models.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_model_is_registered_and_every_row_is_different(script):
    rows = script.all_rows("cuda", 128)
    assert {name_and_options(name)[0] for name in script.MODELS} <= set(timm.list_models())
    assert set(script.PUBLISHED) <= {name_and_options(name)[0] for name in script.MODELS}
    assert len({case for _, case in rows}) == len(rows)
    assert {group for group, _ in rows} == set(script.GROUPS)


def test_rows_are_chosen_by_number_name_and_group(script):
    rows = script.all_rows("cuda", 128)
    assert list(script.chosen(rows, "0-2,7", None, None)) == [0, 1, 2, 7]
    eradio = script.chosen(rows, None, ["eradio_l"], ["train"])
    assert {case.model for case in eradio.values()} == {
        "eradio_l,window_size=16", "eradio_l,window_size=8",
    }  # fmt: skip
    one = script.chosen(rows, None, ["eradio_l,window_size=8"], ["train"])
    assert {case.mode for case in one.values()} == {"train", "train+compiled", "train+graphs"}
    with pytest.raises(ValueError, match="No row is left"):
        script.chosen(rows, "9999", None, None)


@pytest.mark.slow
def test_a_rehearsal_writes_what_it_measured_and_names_what_it_did_not(script, tmp_path, capsys):
    out = tmp_path / "run.json"
    rehearse = [
        "--device", "cpu", "--batch", "1", "--size-factor", "0.25", "--rounds", "2",
        "--warmup", "1", "--models", "eradio_xxxtiny,window_size=8",
    ]  # fmt: skip
    (number, *_) = script.chosen(
        script.all_rows("cpu", 1), None, ["eradio_xxxtiny,window_size=8"], None
    )
    script.main([*rehearse, "--rows", str(number), "--out", str(out), "--profile", "2"])
    (found,) = script.read_rows(out)
    assert found.error is None and len(found.seconds) == 2 and len(found.kernels) == 2
    assert found.case.size == 64 and found.relative_error < 0.1
    assert json.loads(out.read_text())["versions"]["timm"] == timm.__version__
    assert "floor unknown" in capsys.readouterr().out

    again = [*rehearse, "--rows", str(number), "--seconds", "0", "--compare", str(out)]
    script.main(again)
    shown = capsys.readouterr().out
    assert "not run: the 0 s were over" in shown
    assert f"Without a figure: --rows {number}" in shown


@pytest.mark.parametrize(("given", "limit"), [([], 0), (["10"], 10)])
def test_a_run_says_how_many_convolutions_it_tried(script, tmp_path, monkeypatch, given, limit):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark_limit", 3)
    out = tmp_path / "run.json"
    nothing = ["--device", "cpu", "--rows", "0", "--seconds", "0", "--out", str(out)]
    script.main([*nothing, "--cudnn-benchmark", *given])
    said = json.loads(out.read_text())
    assert (said["cudnn_benchmark"], said["cudnn_benchmark_limit"]) == (True, limit)


def test_the_list_measures_nothing(script, capsys):
    script.main(["--list", "--models", "fastervit_0", "--group", "train"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("fastervit_0 train" in line for line in lines)


def test_the_summary_sets_the_best_row_beside_the_published_code(script):
    def row(speed, mode, peak=2**30):
        case = Case(model="mambavision_t", mode=mode, batch=100, device="cuda")
        return Measured(case=case, seconds=[100 / speed], peak_bytes=peak)

    rows = [row(13013, "eager"), row(26026, "deploy+compiled"), row(6876, "train", 3 * 2**30)]
    (line,) = script.summary(rows)[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["mambavision_t", "deploy+compiled float32", "26,026", "2.00", "21,000"]
    assert cells[5:] == ["train float32", "6,876", "2.00", "5,501", "3.0 (4.0)"]
    told = script.line_of(7, rows[2], {rows[2].case: row(3438, "train")})
    assert "2.00 x published" in told and "2.00 x earlier" in told and "3.0 GiB" in told
