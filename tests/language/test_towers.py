"""The table of language models: counts, behaviour of every family, and what is refused."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.language.open import open_language_model, own_tokenizer
from zoo.language.sizes import FAMILIES, TABLE
from zoo.language.tokenizers import open_tokenizer
from zoo.language.tokens import check_features
from zoo.language.towers import facts_of

transformers = pytest.importorskip("transformers")

COUNTED = {  # parameters in thousand millions, to all digits that are known
    "nemotron4_15b": "15.629", "nemotron4_340b": "341.029", "minitron_8b": "8.272",
    "minitron_4b": "4.191", "nemotron_h_4b": "4.489", "nemotron_h_8b": "8.100852736",
    "nemotron_h_47b": "46.792", "nemotron_h_56b": "56.324", "mamba2_hybrid_8b": "8.655",
    "mamba2_8b": "8.237", "mamba_codestral_7b": "7.285403648",
    "hyena_1b": "1.108", "hyena_7b": "6.481", "hyena_7b_262k": "6.481", "hyena_7b_1m": "6.582",
    "hyena_20b": "19.739", "hyena_40b": "40.331", "hyena_40b_1m": "41.118",
}  # fmt: skip
ROUNDED = {  # as papers and model cards give them
    "llama2_7b": "6.74", "llama3_8b": "8.03", "llama3_70b": "70.6", "llama3_1_8b": "8.03",
    "llama3_2_1b": "1.24", "llama3_2_3b": "3.21",
    "qwen3_0_6b": "0.6", "qwen3_1_7b": "1.7", "qwen3_4b": "4.0", "qwen3_8b": "8.2",
    "qwen3_14b": "14.8", "qwen3_32b": "32.8", "qwen3_30b_a3b": "30.5", "qwen3_235b_a22b": "235",
    "gemma3_270m": "0.268", "gemma3_1b": "1.000", "gemma3_4b": "3.88", "gemma3_12b": "11.8",
    "gemma3_27b": "27.0",  # 2503.19786, table 1, without the vision tower
    "mixtral_8x7b": "46.7", "mixtral_8x22b": "140.6",
    "mamba2_130m": "0.13", "mamba2_370m": "0.37", "mamba2_780m": "0.78", "mamba2_1_3b": "1.3",
    "mamba2_2_7b": "2.7", "nemotron_nano2_9b": "8.89", "nemotron3_nano_30b_a3b": "31.6",
    "zamba2_1_2b": "1.2", "zamba2_2_7b": "2.7", "zamba2_7b": "7.4",
    "falcon_h1_0_5b": "0.521", "falcon_h1_1_5b_deep": "1.55", "falcon_h1_7b": "7.59",
    "falcon_h1_34b": "33.6",
    "granite4_h_350m": "0.340", "granite4_h_1b": "1.46", "granite4_h_micro": "3.19",
    "granite4_h_tiny": "6.94", "granite4_h_small": "32.2",
}  # fmt: skip
BILLIONS = COUNTED | ROUNDED
NAMES = [
    pytest.param(name, marks=[] if name in COUNTED or "tiny" in name else pytest.mark.long)
    for name in TABLE
]

QUICK = ("llama", "gemma3", "nemotron_h")
EVERY = [
    pytest.param(family.name, marks=[] if family.name in QUICK else pytest.mark.long)
    for family in FAMILIES
]
PLAIN = [family.name for family in FAMILIES if ":" not in family.config]
"""Those whose class is in transformers."""
STATE_SPACE = {family.name for family in FAMILIES if family.state_space}


def tiny(name, **fields):
    torch.manual_seed(0)
    return zoo.create_model(f"{name}_tiny", **fields).eval()


def ids(rows=2, length=11):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the table


def test_every_published_size_has_a_published_count():
    assert set(BILLIONS) == {name for family in FAMILIES for name in family.sizes}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_builds_what_the_table_and_the_papers_say(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    count, facts = sum(p.numel() for p in model.parameters()), facts_of(name)
    assert count == facts.parameters
    assert model.config.num_hidden_layers == facts.layers
    assert getattr(model.config, "max_position_embeddings", None) == facts.context
    assert type(model).__module__.startswith(("transformers.models.", "zoo.language.hyena"))
    if stated := BILLIONS.get(name):
        digits = len(stated.partition(".")[2])
        assert f"{count / 1e9:.{digits}f}" == stated


def test_the_names_are_listed_by_kind_and_not_by_timm(capsys):
    import timm

    names = zoo.list_models(kind="language")
    assert names == sorted(TABLE) and not set(names) & set(timm.list_models())
    assert zoo.list_models("mini*", kind="language") == ["minitron_4b", "minitron_8b"]
    assert not set(names) & set(zoo.list_models())
    main(["list", "--kind", "language", "nemotron_h_8b"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("8,100.85 M", "52", "8,192", "scientific-research"))


def test_a_shape_of_ones_own_has_its_pattern_and_its_widths():
    model = zoo.create_model("nemotron_h", pattern="M-M*-ME", d_model=256)
    assert type(model) is transformers.NemotronHForCausalLM
    assert model.config.hybrid_override_pattern == "M-M*-ME"
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.shape == (1, 9, 257)
    wide = zoo.create_model("llama", d_model=512, num_hidden_layers=1)
    assert wide.config.num_attention_heads * wide.config.head_dim == 512


# ---------------------------------------------------------------- behaviour


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Let casts to float32 be casts to float64: transformers takes its scans in float32."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def wide(value):
        return torch.float64 if value is torch.float32 else value

    def cast(self, *args, **kwargs):
        return to(self, *map(wide, args), **{key: wide(value) for key, value in kwargs.items()})

    torch.Tensor.to, torch.Tensor.float = cast, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, single


@torch.no_grad()
def cached_error(model) -> float:
    """The largest difference of cached generation's logits to those of the whole text at once."""
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, args, logits: seen.append(logits[:, -1])
    )
    text = model.generate(ids(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    hook.remove()
    full = model(text, use_cache=False).logits[:, ids().shape[1] - 1 : -1]
    return (torch.stack(seen, 1) - full).abs().max().item()


@pytest.mark.parametrize("name", EVERY)
def test_cached_generation_is_that_of_the_whole_text(name):
    assert cached_error(tiny(name)) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_cached_generation_is_that_of_the_whole_text_in_float64(name):
    # Nemotron-H's experts add into a float32 tensor that no cast makes.
    model = tiny(name, **(dict(pattern="M-*") if name == "nemotron_h" else {})).double()
    model.set_experts_implementation("eager")
    with in_double() if name in STATE_SPACE else contextlib.nullcontext():
        assert cached_error(model) < 1e-10


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_model_is_read_bit_exact_and_its_features_give_its_logits(name, tmp_path):
    model = tiny(name)
    check_features(model, name)
    model.save_pretrained(tmp_path)
    assert_equal(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert_equal(model, zoo.create_model(name, pretrained=tmp_path))


@torch.no_grad()
def assert_equal(first, second):
    assert type(first) is type(second)
    assert torch.equal(first(ids()).logits, second.eval()(ids()).logits)


@pytest.mark.long
def test_exports_are_read_bit_equal_without_zoo(tmp_path):
    with torch.no_grad():
        for name in PLAIN:
            model = tiny(name)
            model.save_pretrained(tmp_path / name)
            torch.save(model(ids()).logits, tmp_path / f"{name}.pt")
    torch.save(ids(), tmp_path / "ids.pt")
    code = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
for file in sorted(Path(".").glob("*.pt")):
    if file.stem != "ids":
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(file.stem)(torch.load("ids.pt")).logits
        assert torch.equal(logits, torch.load(file)), file.stem
        print(file.stem)
assert "zoo" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == sorted(PLAIN)


# ---------------------------------------------------------------- weights


def test_weights_of_another_family_or_size_are_refused_by_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of the kind llama, not qwen3; its name"):
        zoo.create_model("qwen3", pretrained=tmp_path)
    with pytest.raises(ValueError, match=r"hidden_size = 32, and llama3_8b has 4096"):
        zoo.create_model("llama3_8b", pretrained=tmp_path)
    with pytest.raises(ValueError, match="d_model cannot be set"):
        zoo.create_model("llama", pretrained=tmp_path, d_model=64)


def test_a_gguf_file_becomes_a_plain_model_that_saves(tiny_gguf, tmp_path):
    model = zoo.create_model("gemma3", pretrained=tiny_gguf)
    assert type(model) is transformers.Gemma3ForCausalLM
    model.save_pretrained(tmp_path / "plain")
    assert_equal(model, zoo.create_model("gemma3", pretrained=tmp_path / "plain"))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """A cache of the Hub with one repository, owner/name, and no network."""
    from huggingface_hub import constants

    model = tiny("llama")
    repository = tmp_path / "hub" / "models--owner--name"
    model.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    return model


def test_a_repository_is_read_from_the_cache_and_missed_in_one_line(offline_hub):
    assert_equal(offline_hub, zoo.create_model("llama", pretrained="owner/name"))
    assert_equal(offline_hub, open_language_model("lm:llama/owner/name"))
    assert_equal(offline_hub, open_language_model("lm:owner/name"))
    assert own_tokenizer("lm:llama/owner/name") == "bytes"
    for opened in (
        lambda: zoo.create_model("qwen3_8b", pretrained=True),
        lambda: open_language_model("qwen3_8b"),
        lambda: open_tokenizer("qwen3_8b"),
        lambda: open_tokenizer("owner/other"),
    ):
        with pytest.raises(ValueError, match="cannot be fetched") as refused:
            opened()
        assert "\n" not in str(refused.value) and "hf download" in str(refused.value)
    with pytest.raises(ValueError, match="no tokenizer in owner/name"):
        open_tokenizer("owner/name")


def test_a_folder_that_is_misspelt_is_missed_with_the_nearest(offline_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    offline_hub.save_pretrained("small")
    with pytest.raises(ValueError, match=r"no folder smal here .Did you mean small\?."):
        open_language_model("lm:smal")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, fields, said",
    [
        ("nemotron_h", dict(pattern="M-X*"), r"'X' in place 2 .* M \(linear_attention\)"),
        ("nemotron_h", dict(pattern="M-M"), r"needs at least one '\*'"),
        ("nemotron_h", dict(pattern=""), "needs at least one"),
        ("zamba2", dict(pattern="MM"), "needs at least one 'H'"),
        ("nemotron_h_8b", dict(num_hidden_layers=4), "are those of its pattern"),
        ("llama", dict(num_attention_heads=3), "cannot have these numbers: .*multiple"),
        ("llama", dict(num_key_value_heads=3), "= 4 of llama does not split into 3 groups"),
        ("nemotron_h", dict(n_groups=3), "= 8 of nemotron_h does not split into 3 groups of the"),
        ("llama", dict(d_model=100), "rotary positions turn pairs|RoPE requires an even"),
        ("mamba2", dict(hidden_size=100), "cannot have these numbers"),
        ("mixtral", dict(num_experts_per_tok=9), "cannot meet 9 experts of 8"),
        ("llama", dict(hiden_size=64), "no field 'hiden_size' .* Did you mean hidden_size"),
        ("llama", dict(pattern="M"), "no field 'pattern'"),
        ("llama3_9b", {}, "Did you mean llama3_8b"),
        ("lama_tiny", {}, "Did you mean llama_tiny"),
        ("mambavison_t", {}, "Did you mean mambavision_t"),
        ("nemotron4_15b", dict(pretrained=True), "has no released weights"),
        ("llama", dict(pretrained="./nowhere"), r"config\.json is missing"),
        ("resnet18", dict(pretrained="folder"), "is for language models, and resnet18 is none"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_in_one_line(name, fields, said):
    with pytest.raises(ValueError, match=said) as refused:
        zoo.create_model(name, **fields)
    assert "\n" not in str(refused.value)


def test_a_kind_of_models_that_is_none_is_refused():
    with pytest.raises(ValueError, match="give vision or language"):
        zoo.list_models(kind="audio")


# ---------------------------------------------------------------- the names in commands


def test_prune_takes_a_name_with_random_weights_and_one_with_a_folder(tmp_path, capsys):
    words = ["--to", "ffn=0.5", "--score", "magnitude", "--out"]
    main(["prune", "llama_tiny/random", *words, str(tmp_path / "half")])
    main(["prune", f"llama/{tmp_path / 'half'}", *words, str(tmp_path / "quarter")])
    config = json.loads((tmp_path / "quarter" / "config.json").read_text())
    assert config["intermediate_size"] == TABLE["llama_tiny"][1].fields["intermediate_size"] // 4
    for name in ("llama_tiny", f"qwen3/{tmp_path / 'half'}"):
        with pytest.raises(SystemExit):
            main(["prune", name, *words, str(tmp_path / "no")])
        said = capsys.readouterr().err
        assert "no released weights" in said or "not qwen3" in said


def test_distilling_a_text_takes_names_and_refuses_rows_beyond_the_positions(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    words = f"distill --text {text} --student lm:gemma3_tiny/random --losses.kl 0 --losses.ce 1 "
    words += f"--batch 4 --steps 2 --out {tmp_path / 'run'} --length "
    with pytest.raises(SystemExit):
        main([*words.split(), "1024"])
    assert "longer than the 512 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    main([*words.split(), "32"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert type(plain) is transformers.Gemma3ForCausalLM
