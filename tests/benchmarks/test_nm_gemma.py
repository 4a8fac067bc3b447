"""The script that thins a language model by every method, on a tiny Gemma and a CPU."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "nm_gemma.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nm_gemma", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    place = tmp_path_factory.mktemp("nm_gemma")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).save_pretrained(place / "gemma")
    ids = torch.randint(0, 64, (2048,)).numpy().astype(np.int32)
    np.save(place / "text.npy", ids)
    text = str(place / "text.npy")
    given = [str(place / "gemma"), "--train", text, text, "--valid", text, "--test", text]
    sizes = "--steps 2 --tokens 64 --length 32 --calibration 4 --rows 4 --seeds 0 1 --device cpu"
    return [*given, *sizes.split(), "--json", str(place / "nm.json")]


@pytest.mark.slow
def test_every_cell_is_measured_once_and_a_stopped_run_goes_on(script, words, capsys):
    read = script.parser().parse_args
    script.run(read([*words, "--deadline", "0"]))
    assert "left for --resume" in capsys.readouterr().out
    script.run(read([*words, "--methods", "dense", "magnitude", "wanda", "sparsegpt"]))
    before = json.loads(Path(words[-1]).read_text())["cells"]
    done = script.run(read([*words, "--resume"]))
    assert done[:4] == before
    names = [(row["method"], row.get("seed")) for row in done]
    assert names == [
        ("dense", None), ("magnitude", None), ("wanda", None), ("sparsegpt", None),
        ("learned", 0), ("learned", 1), ("weights", 0), ("weights", 0), ("weights", 1),
    ]  # fmt: skip
    tried = {row["lr"]: row["valid"] for row in done[6:8]}
    assert done[8]["lr"] == min(tried, key=lambda lr: tried[lr])
    assert json.loads(Path(words[-1]).read_text())["cells"] == done
    script.table(done)
    assert "±" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        script.run(read([*words, "--resume", "--steps", "3"]))


@pytest.mark.slow
def test_the_arms_start_from_one_mask_and_see_the_same_batches(script, words):
    bench = script.Bench(script.parser().parse_args(words))
    ids = [[batch.ids for batch in bench.batches(seed)] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(ids[0], ids[1], strict=True))
    assert not torch.equal(ids[0][0], ids[2][0])
    bench.one_shot("magnitude")
    expected = {name: layer.weight != 0 for name, layer in bench.layers.items()}
    bench.weights(seed=0, lr=1e-2)
    for name, layer in bench.layers.items():
        assert torch.equal(layer.weight != 0, expected[name])
        assert not torch.equal(layer.weight, bench.dense[name] * expected[name])
    bench.learned(seed=0, lr=1e-3)
    for name, layer in bench.layers.items():
        kept = layer.weight != 0
        assert torch.equal(layer.weight, bench.dense[name] * kept)
