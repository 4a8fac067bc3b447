"""`zoo train-lm`: a language model from a text alone."""

import json
import shlex
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from zoo.cli import main  # noqa: E402

HOW = shlex.split("--length 16 --batch 4 --steps 8 --every.log 1 --optim.lr 1e-2 --device cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("random")
    Path("text.txt").write_text("abcdefgh " * 200)
    return tmp_path


def losses(run: str) -> list[float]:
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_text_is_learnt_and_learnt_on_and_a_checkpoint_is_exported(folder, capsys):
    main(["train-lm", "--text", "text.txt", "--model", "lm:random", "--out", "lm", *HOW])
    first = losses("lm")
    assert first[-1] < first[0] - 1
    main(["train-lm", "--text", "text.txt", "--model", "lm:lm/export", "--out", "more", *HOW])
    assert losses("more")[0] == pytest.approx(first[-1], abs=0.5)
    main(["export", "lm", "--out", "copy"])
    assert "raw weights after step 8" in capsys.readouterr().out
    ours, theirs = (Path(name, "model.safetensors").read_bytes() for name in ("copy", "lm/export"))
    assert ours == theirs
    assert Path("copy/config.json").read_text() == Path("lm/export/config.json").read_text()


def test_it_is_distillation_by_cross_entropy(folder):
    main(["train-lm", "--text=text.txt", "--model=lm:random", "--out", "lm", *HOW])
    alike = ["--losses.kl", "0", "--losses.ce", "1", "--optim.betas", "0.9", "0.95"]
    words = ["distill", "--text", "text.txt", "--student", "lm:random", "--out", "distilled"]
    main([*words, *alike, *HOW])
    assert losses("lm") == losses("distilled")


def test_teachers_are_for_distill(capsys):
    with pytest.raises(SystemExit):
        main(["train-lm", "--text", "text.txt", "--teachers", "lm:x"])
    assert "for teachers there is zoo distill --text" in capsys.readouterr().err
