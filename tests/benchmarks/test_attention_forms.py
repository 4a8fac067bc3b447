"""benchmarks/attention_forms.py, at the size that a CPU can."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "attention_forms.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_has_every_form_says_what_does_not_run_and_goes_on(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("attention_forms", FILE)
    forms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forms)
    file = tmp_path / "forms.json"
    monkeypatch.setattr(sys, "argv", ["forms", "--tiny", "--json", str(file)])
    monkeypatch.setattr(forms, "TINY", forms.TINY[:1])
    forms.main()
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == set(forms.CALLS)
    assert rows["split"]["difference"] < 1e-6 and rows["split"]["ms"] > 0
    assert "ms" in rows["varlen"] or "Error" in rows["varlen"]["error"]
    capsys.readouterr()
    forms.main()
    assert not capsys.readouterr().out  # all rows are there
