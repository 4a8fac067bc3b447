"""benchmarks/attention_lengths.py, at the size that a CPU can."""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "attention_lengths.py"


def test_every_call_has_a_new_length_and_the_table_has_every_case(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("attention_lengths", FILE)
    lengths = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lengths)
    file = tmp_path / "lengths.json"
    monkeypatch.setattr(sys, "argv", ["lengths", "--tiny", "--json", str(file)])
    widths, attend = [], lengths.F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        widths.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(lengths.F, "scaled_dot_product_attention", watched)
    lengths.main()
    rows = json.loads(file.read_text())["rows"]
    cases = ["generation", "training", "training_again"]
    assert [(row["form"], row["case"]) for row in rows] == [
        (form, case) for form in ("own", "any_length") for case in cases
    ]
    generated = [keys for queries, keys in widths if queries == 1]
    assert len(set(generated)) == len(generated) / 2  # each is new, once in each form
    assert all(b == a + 1 for a, b in pairwise(generated[: len(generated) // 2]))
