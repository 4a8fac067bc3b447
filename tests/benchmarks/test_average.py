"""The script that holds averages against the weights of the last step, in small."""

import importlib.util
import json
from pathlib import Path

import pytest

from zoo.train.average import AGE

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "average.py"


@pytest.mark.long
def test_every_average_of_one_training_is_measured(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("average", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--tiny", "--out", str(tmp_path / "found.json")])
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["default"] == f"age 1/{1 / AGE:g}"
    for forms in kept["found"].values():
        assert {"raw", "0.999", kept["default"]} < set(forms)
        cosines = {name: values["cosine/summary"] for name, values in forms.items()}
        assert cosines["0.999"] < cosines["raw"] - 0.1  # it is still at the first weights
        assert cosines[kept["default"]] == pytest.approx(cosines["raw"], abs=0.05)
    assert "| 20 | raw |" in capsys.readouterr().out
