"""Models in GGUF: read as float, refused where that would go unseen."""

import importlib.util
import json

import pytest
import torch

from zoo.cli import main
from zoo.data.text import open_text
from zoo.language.gguf import dequantised, find_gguf
from zoo.language.open import open_language_model
from zoo.language.tokenizers import open_tokenizer

transformers = pytest.importorskip("transformers")


def test_a_gguf_file_becomes_a_plain_folder_that_computes_what_transformers_reads(tiny_gguf):
    folder = dequantised(tiny_gguf)
    assert dequantised(tiny_gguf) == folder  # the second time it is there
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(260, 280)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, read(ids).logits)
        assert torch.equal(open_language_model(f"lm:{tiny_gguf}")(ids).logits, read(ids).logits)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "<bos>ab c"


def test_prune_saves_a_quantised_parent_as_float_only_when_told_so(tiny_gguf, tmp_path, capsys):
    out = tmp_path / "small"
    words = f"prune {tiny_gguf} --to ffn=0.5 --score magnitude --out {out}".split()
    with pytest.raises(SystemExit):
        main(words)
    assert "will be saved as float; pass --dequantise" in capsys.readouterr().err
    assert not out.exists()
    main([*words, "--dequantise"])
    child = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (child.config.intermediate_size, child.dtype) == (96, torch.float32)
    assert transformers.AutoTokenizer.from_pretrained(out).bos_token_id == 2


def test_a_missing_package_a_missing_file_and_two_files_are_named(tmp_path, monkeypatch):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        find_gguf(tmp_path)
    with pytest.raises(ValueError, match="There is no file"):
        dequantised(tmp_path / "c.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "gguf" and find(name))
    with pytest.raises(ValueError, match="needs gguf"):
        dequantised(tmp_path / "a.gguf")


def test_its_rows_begin_with_its_token_for_a_beginning(tiny_gguf, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdef" * 9)
    source = open_text(text, open_tokenizer(str(dequantised(tiny_gguf))), 8)
    assert set(source.rows(range(len(source))).ids[:, 0].tolist()) == {2}
