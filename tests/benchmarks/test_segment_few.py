"""The script that segments a few images, on a CPU and coloured blocks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from zoo.eval.extremes import LINE, MARGIN
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import export_student

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "segment_few.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("segment_few", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.slow
def test_an_export_stands_beside_its_untrained_twin_with_every_seed(script, tmp_path, capsys):
    student = build_student("eradio_nano", {"t": (4, 4)}, size=64).eval()
    export_student(student, tmp_path / "mine" / "export", Batch(torch.rand(1, 3, 64, 64)))
    out = tmp_path / "found"
    script.main([str(tmp_path / "mine" / "export"), "test_vit", "--tiny", "--out", str(out)])
    kept = json.loads((out / "segment_few.json").read_text())
    names = ["mine", "mine, untrained", "test_vit"]
    assert list(kept["values"]) == names
    assert all(len(seeds) == 2 for seeds in kept["values"].values())
    assert kept["parameters_M"]["mine"] == kept["parameters_M"]["mine, untrained"]
    assert kept["data"]["classes"] == ["red", "green", "blue"]
    table = (out / "segment_few.md").read_text()
    assert table.strip() in capsys.readouterr().out
    first = [seed["segment/miou"] for seed in kept["values"]["mine"]]
    assert f"| mine | 0.8 | {sum(first) / 2:.2f} ± " in table
    # image, truth and three predictions, four beside each other
    with Image.open(out / "segment_few.png") as picture:
        assert picture.size == (4 * 128, 2 * (96 + MARGIN + LINE + script.LABEL))


def test_without_models_or_data_the_script_says_what_it_wants(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["resnet18", "--out", str(tmp_path)])
    assert "--data, or ask for --tiny" in capsys.readouterr().err
