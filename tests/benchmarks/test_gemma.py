"""Gemma's benchmark, on a CPU and a tiny Gemma: from a GGUF file to its tables."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from zoo.language.gguf import dequantised

transformers = pytest.importorskip("transformers")


@pytest.fixture
def script(monkeypatch):
    """Run `python -m benchmarks.gemma.NAME WORDS` in this process."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent))

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        importlib.import_module(f"benchmarks.gemma.{name}").main()

    return run


@pytest.fixture
def unpacked(tiny_gguf, tmp_path, script):
    draws = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    for name in ("train", "test"):
        (tmp_path / name).write_text(" ".join(draws.choice(words) for _ in range(150)))
    texts = ("--train", tmp_path / "train", "--test", tmp_path / "test")
    script("pack", tiny_gguf, *texts, "--out", tmp_path / "parts", "--parts", "3")
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == 3
    script("unpack", *parts, "--out", tmp_path / "gemma")
    return tmp_path / "gemma"


def test_what_was_packed_and_unpacked_is_what_transformers_reads_from_gguf(unpacked, tiny_gguf):
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (unpacked / "model", dequantised(tiny_gguf))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.long
def test_a_stopped_run_goes_on_and_fills_its_tables(unpacked, tmp_path, script, capsys):
    words = (unpacked, "--out", tmp_path / "out", "--tiny")
    script("run", *words, "--parts", "grid", "--seconds", "0")
    done = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not done["cells"]
    script("run", *words, "--parts", "grid", "--resume")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rates"] == done["rates"]
    assert len(found["cells"]) == 6 + 15 + 5
    more = found["cells"]["0.5-both-pruned-ce-more-s0"]
    plain = found["cells"]["0.5-both-pruned-ce-s0"]
    distilled = found["cells"]["0.5-both-pruned-kd-s0"]
    assert more["operations"] == pytest.approx(distilled["operations"], rel=0.1)
    assert plain["operations"] < 0.9 * distilled["operations"]
    for cell in found["cells"].values():  # norms are not counted in the budget
        assert cell["body"] <= 1.01 * cell["share"] * found["dense"]["body"]
    printed = capsys.readouterr().out
    assert "| 50% | both |" in printed
    assert (tmp_path / "out" / "recovery.png").is_file()


@pytest.mark.slow
def test_depth_starts_from_the_same_parent_for_every_score(unpacked, tmp_path, script, capsys):
    script("run", unpacked, "--out", tmp_path / "out", "--tiny", "--parts", "depth")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = found["depth"]["removed"]
    assert {(row["what"], row["by"]) for row in rows} >= {
        ("layers", "Shapley"), ("layers", "block influence"), ("attention", "loss"), ("ffn", "loss")
    }  # fmt: skip
    assert all(row["perplexity"][0] == pytest.approx(found["dense"]["held"]) for row in rows)
    one = next(row for row in found["depth"]["emulated"] if row["what"] == "ffn")
    first = next(row for row in rows if row["what"] == "ffn")["perplexity"][1]
    assert one["nothing"] == pytest.approx(first, rel=1e-3)
    assert "| attention | 1 |" in capsys.readouterr().out
