"""`zoo prune`: the table of a model, and what is refused before any work starts."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zoo
import zoo.axes
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
        ("resnet81", "There is no model 'resnet81'; `zoo list`"),
        ("timm:resnet18", "as a model it is called resnet18"),
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


@pytest.mark.parametrize("how", ["loss", "shapley", "contiguous", "means"])
def test_layers_go_by_what_their_absence_costs(how, vit, images, tmp_path):
    out = tmp_path / "small"
    words = f"--to layers=2 --data {images} --samples 8 --layer-score {how} --out {out}"
    main(["prune", str(vit), *words.split()])
    assert len(timm.create_model(f"local-dir:{out}", pretrained=True).blocks) == 2


def test_attention_goes_without_its_ffn_and_something_small_stands_in(
    vit, images, tmp_path, capsys
):
    out = tmp_path / "small"
    words = f"--to attention_layers=2,ffn=0.5 --data {images} --samples 8 --out {out}"
    with pytest.raises(SystemExit):
        main(["prune", str(vit), *words.split()])
    assert "give --form zoo" in capsys.readouterr().err
    main(["prune", str(vit), *words.split(), "--form", "zoo", "--emulate", "2"])
    assert "child = masked parent" in capsys.readouterr().out
    (gone,) = json.loads((out / "prune.json").read_text())["without"]
    part = zoo.create_model(f"local-dir:{out}").get_submodule(gone)
    assert part.down.weight.shape == (2, 24)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Say what stays"),
        ("--to ffn=0.5", "--out DIR; or --dry-run"),
        ("--to ffn=0.5 --dry-run", "look at data: give --data"),
        ("--to ffn=0.5 --dry-run --form onnx", "There is no form 'onnx'"),
        ("--to ffn=0.5 --dry-run --score best", "There is no score 'best'"),
        ("--to ffn=0.5 --dry-run --layer-score best", "There is no score of layers 'best'"),
        ("--to nothing=0.5 --dry-run --score random", "has no 'nothing'; it has stream, ffn"),
        ("--to heads=0.5 --dry-run --score random", "Cut them together"),
        ("--to ffn=0.5 --dry-run --data IMAGES --samples 9", "has 8 images, not the 9"),
        ("--to ffn=0.5 --dry-run --data IMAGES --samples 1", "--samples is 1; it is 8 or more"),
        ("--to ffn=0.5 --dry-run --data IMAGES --batch 0", "--batch is 0; it is 1 or more"),
        ("--to ffn=0.5 --dry-run --data NOWHERE", "NOWHERE"),
        ("--to ffn=0.5 --out IMAGES --score random", "is there already"),
        ("--to *.attn.d=0.5 --dry-run --score random", "blocks.0.attn.d keeps its size: scale"),
        ("--to ffn=999 --dry-run --score random", "keeps more than the 96 there are"),
        ("--to stream=0.5 --dry-run --score random --device mps", "There is no Apple GPU"),
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


TABLES = "\n".join(path.read_text() for path in Path(zoo.axes.__file__).parent.glob("tables/*.txt"))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("qkv.weight                  3 h d, C", "", "blocks.0.attn.qkv.weight"),
        ("qkv.weight                  3 h d, C", "qkv.weight  5 h d, C", "dim 0 has length 72"),
        ("qkv.weight                  3 h d, C", "qkv.weight  h 3 d, C", "The table is wrong"),
    ],
)
def test_a_wrong_table_ends_with_one_line_and_writes_nothing(
    right, wrong, message, vit, images, tmp_path, monkeypatch, capsys
):
    tables = zoo.axes.parse_tables(TABLES.replace(right, wrong))
    monkeypatch.setattr(zoo.axes, "table_blocks", lambda: tables)
    out = tmp_path / "small"
    words = f"{vit} --to heads=0.5,stream=0.5 --data {images} --samples 8 --out {out}"
    with pytest.raises(SystemExit):
        main(["prune", *words.split()])
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_axis_that_the_samples_do_not_reach_is_refused(vit, images, tmp_path, capsys):
    weights = load_file(vit / "model.safetensors")
    for i in range(3):
        weights[f"blocks.{i}.mlp.fc2.weight"].zero_()
    save_file(weights, vit / "model.safetensors")
    out = tmp_path / "small"
    words = f"{vit} --to ffn=0.5 --data {images} --samples 8 --out {out}"
    with pytest.raises(SystemExit):
        main(["prune", *words.split()])
    assert "mlp.f is blind" in capsys.readouterr().err
    assert not out.exists()


LANGUAGE = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    vocab_size=40,
)  # fmt: skip
MIXTRAL = dict(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)
HYBRID = dict(
    layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=8, mamba_head_dim=8,
    ssm_state_size=6, n_groups=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=1,
    moe_intermediate_size=24, moe_shared_expert_intermediate_size=20, n_group=2, topk_group=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "to", "message"),
    [
        ("Llama", dict(num_hidden_layers=1), "*.self_attn.d=0.5", "keeps its size: rope"),
        ("Llama", dict(num_hidden_layers=1), "heads=3", "heads=3 keeps more than the 2 there are"),
        ("Mixtral", MIXTRAL, "experts=1", "gives each token to 2 experts cannot have 1; keep"),
        ("NemotronH", HYBRID, "experts=3", "3 experts do not split into the router's 2 groups"),
    ],
)
def test_what_a_language_model_cannot_be_ends_with_one_line(
    kind, fields, to, message, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**LANGUAGE, **fields)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    words = f"--to {to} --score random --out {tmp_path}/small"
    with pytest.raises(SystemExit):
        main(["prune", str(tmp_path / "model"), *words.split()])
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
