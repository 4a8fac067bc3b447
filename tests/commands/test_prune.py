"""`zoo prune`: the table of a model, and what is refused before any work starts."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.cli import main
from zoo.students.prune.library import Parent, save


def test_shapes_lists_tensors_and_axes_layers_of_one_form_once(capsys):
    main(["prune", "vit_tiny_patch16_224/random", "--shapes"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any("blocks.#.attn.qkv.weight x12 │ 576 192 │ 3 h d, C" in line for line in lines)
    assert any("blocks.#.attn.d x12 │ 64 │ 3 │ no: scale" in line for line in lines)
    assert lines[-1] == "5,717,416 numbers in 152 tensors"


def test_shapes_of_an_unknown_class_or_model_end_with_one_line(capsys, tmp_path):
    for name, message in [
        ("beit_base_patch16_224/random", "tensors of Beit have no named shape"),
        ("no_such_model", "no_such_model is no folder and no registered model"),
        (str(tmp_path), "holds no model: config.json"),
    ]:
        with pytest.raises(SystemExit):
            main(["prune", name, "--shapes"])
        assert message in capsys.readouterr().err


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(8):
        pixels = draws.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def vit(tmp_path):
    """A folder of timm with a tiny ViT."""
    torch.manual_seed(0)
    arguments = dict(embed_dim=24, depth=3, num_heads=4, img_size=32)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    save(Parent(model, "vit_tiny_patch16_224", arguments), tmp_path / "vit")
    return tmp_path / "vit"


def test_prune_writes_a_plain_timm_checkpoint_and_what_stayed(vit, images, tmp_path, capsys):
    out = tmp_path / "small"
    words = f"{vit} --to stream=0.5,ffn=0.5,layers=2 --data {images} --samples 8 --out {out}"
    main(["prune", *words.split()])
    printed = capsys.readouterr().out
    assert "activation   distance" in printed
    assert "contribution distance" in printed
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    assert any("│ tensors │ 44 │ 32 │" in row for row in rows)
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.embed_dim == 12
    assert len(model.blocks) == 2
    about = json.loads((out / "prune.json").read_text())
    assert about["numbers"] == sum(p.numel() for p in model.parameters())
    parent = timm.create_model(f"local-dir:{vit}", pretrained=True)
    kept, layers = about["kept"]["C"]["kept"], about["layers"]["blocks"]
    assert torch.equal(model.norm.weight, parent.norm.weight[kept])
    first = parent.blocks[layers[1]].norm1.weight[kept]
    assert torch.equal(model.blocks[1].norm1.weight, first)


def test_prune_cuts_a_llama_folder_with_its_tokenizer_and_proves_it(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder, out, text = tmp_path / "llama", tmp_path / "small", tmp_path / "text.txt"
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
    text.write_text(" ".join(words * 30))
    vocabulary = {word: i for i, word in enumerate([*words, "<eos>", "?"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=14, eos_token_id=12, bos_token_id=12,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    to = "ffn=0.75,heads=1,stream=0.5"
    options = f"--to {to} --data {text} --samples 8 --length 16 --score contribution --out {out}"
    main(["prune", str(folder), *options.split()])
    assert "child = masked parent" in capsys.readouterr().out
    child = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (child.config.hidden_size, child.config.intermediate_size) == (16, 36)
    assert (child.config.num_attention_heads, child.config.head_dim) == (2, 8)
    assert transformers.AutoTokenizer.from_pretrained(out).encode("a c") == [0, 2]


def test_the_zoo_form_has_any_widths(vit, tmp_path):
    out = tmp_path / "small"
    to = "heads=0.5,blocks.1.mlp.f=7"
    main(["prune", str(vit), *f"--to {to} --score magnitude --form zoo --out {out}".split()])
    model = zoo.create_model(f"local-dir:{out}")
    assert model.blocks[0].attn.num_heads == 2
    assert model.blocks[1].mlp.fc2.weight.shape == (24, 7)


@pytest.mark.gpu
def test_the_command_runs_on_the_gpu_and_writes_what_a_cpu_reads(vit, images, tmp_path, capsys):
    out = tmp_path / "small"
    words = f"{vit} --to stream=0.5,ffn=0.5 --data {images} --samples 8 --out {out}"
    torch.cuda.reset_peak_memory_stats()
    main(["prune", *words.split()])
    assert torch.cuda.max_memory_allocated() > 1e5  # auto is the GPU
    assert "child = masked parent" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    kept = json.loads((out / "prune.json").read_text())["kept"]["C"]["kept"]
    parent = timm.create_model(f"local-dir:{vit}", pretrained=True)
    assert torch.equal(model.norm.weight, parent.norm.weight[kept])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Say what stays"),
        ("--to ffn=0.5", "--out DIR; or --dry-run"),
        ("--to ffn=0.5 --dry-run", "look at data: give --data"),
        ("--to ffn=0.5 --dry-run --form onnx", "There is no form 'onnx'"),
        ("--to ffn=0.5 --dry-run --score best", "There is no score 'best'"),
        ("--to nothing=0.5 --dry-run --score random", "has no 'nothing'; it has stream, ffn"),
        ("--to heads=0.5 --dry-run --score random", "Cut them together"),
        ("--to ffn=0.5 --dry-run --data IMAGES --samples 9", "has 8 images, not the 9"),
    ],
)
def test_wrong_requests_end_with_one_line_and_write_nothing(
    words, message, vit, images, tmp_path, capsys
):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main(["prune", str(vit), *words.replace("IMAGES", str(images)).split()])
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
