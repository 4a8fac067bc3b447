"""What the benchmark of lengths measures is what it says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
FILE = Path(__file__).parents[2] / "benchmarks" / "hyena_length.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("hyena_length", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_mamba_2_in_chunks_is_the_layer_of_transformers(bench):
    torch.manual_seed(0)
    layer = bench.Mamba2(32, chunk=8)
    for value in layer.parameters():
        value.normal_(std=0.3)
    x = torch.randn(2, 29, 32)
    theirs = layer.mixer(x)
    close = dict(rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    torch.testing.assert_close(layer.in_torch(x), theirs, **close)


@torch.no_grad()
@pytest.mark.parametrize("letter", ["s", "m"])
def test_the_forms_of_a_filter_compute_the_same(bench, letter):
    operator = bench.OPERATORS[letter](bench.config_of(32, letter))
    operator.start(0.1)
    p = torch.randn(1, 150, 96)
    forms = {k: f(p) for k, f in bench.forms_of(letter, operator).items() if k[:6] == "filter"}
    first, *others = forms.values()
    assert len(others) >= 2
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_tables_are_written_and_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--width", "32", "--decode-width", "32", "--lengths", "64", "128", "--batches", "1"]
    bench.main([*words, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["table"] for row in rows} == {"lengths", "forms", "decode"}
    assert all(row["ms"] > 0 for row in rows)
    bench.main(["--draw", str(tmp_path / "rows.json"), str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
