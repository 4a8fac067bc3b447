"""`zoo upcycle`: transformers' dense classes to their mixtures, and back."""

import json

import pytest
import torch

from zoo.cli import main

transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
HYBRID = dict(
    layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"], mamba_num_heads=4,
    mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
)  # fmt: skip
CLASSES = {
    "Llama": dict(num_hidden_layers=2, tie_word_embeddings=True),
    "Mistral": dict(num_hidden_layers=2),
    "Qwen3": dict(num_hidden_layers=2),
    "NemotronH": HYBRID,
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each class, with norms that are not all ones."""
    place = tmp_path_factory.mktemp("dense")
    for name, more in CLASSES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for key, parameter in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(place / name)
        (place / name / "tokenizer.json").write_text("{}")
    return place


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def error(ours, theirs) -> float:
    ids = torch.randint(64, (3, 21))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("Llama", "Mixtral"),
        pytest.param("Mistral", "Mixtral", marks=pytest.mark.long),
        ("Qwen3", "Qwen3Moe"),
        ("NemotronH", "NemotronH"),
    ],
)
def test_a_mixture_computes_the_same_and_gives_its_dense_model_back(
    models, tmp_path, capsys, name, becomes
):
    words = ["--experts", "4", "--groups", "2", "--top-k", "4", "--out", str(tmp_path / "moe")]
    main(["upcycle", f"lm:{models / name}", *words])
    dense, mixture = opened(models / name), opened(tmp_path / "moe")
    assert type(mixture).__name__ == f"{becomes}ForCausalLM"
    assert error(dense, mixture) < 1e-6
    assert (tmp_path / "moe" / "tokenizer.json").is_file()
    words = ["--dense", "--copy", "3", "--out", str(tmp_path / "again")]
    main(["upcycle", f"lm:{tmp_path / 'moe'}", *words])
    assert "to the bit" in capsys.readouterr().out
    again = opened(tmp_path / "again")
    ours, theirs = (m.config.to_dict() | {"_name_or_path": ""} for m in (again, dense))
    assert ours == theirs
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in dense.state_dict().items())
    assert again.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "words", "least", "most"),
    [
        ("Qwen3", "--router softmax-topk", 1e-6, 0.02),
        ("NemotronH", "--scale cube-root", 0, 1e-6),
    ],
)
def test_other_routers_and_scales_are_as_exact_as_they_can_be(
    models, tmp_path, name, words, least, most
):
    sizes = ["--groups", "2", "--top-k", "4", "--out", str(tmp_path / "moe")]
    main(["upcycle", f"lm:{models / name}", *sizes, *words.split()])
    assert least <= error(opened(models / name), opened(tmp_path / "moe")) <= most


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        ("Llama", "--groups 4 --top-k 2", "--top-k 2 is no multiple of --groups 4"),
        ("Llama", "--groups 5 --top-k 5", "48 channels of an MLP do not split into --groups 5"),
        ("Llama", "--router softmax-topk", "is for qwen3"),
        ("Llama", "--dense", "was not made by zoo upcycle"),
        ("NemotronH", "--scale square-root", "for gated MLPs"),
        ("Llama", "--copy 1", "give it too"),
        ("gpt", "", "A model of type gpt2 cannot be upcycled"),
        ("biased", "", "The model has mlp_bias"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    models, tmp_path, capsys, name, words, error
):
    others = {
        "gpt": dict(model_type="gpt2", n_embd=8, n_head=2, n_layer=1, vocab_size=16),
        "biased": json.loads((models / "Llama" / "config.json").read_text()) | dict(mlp_bias=True),
    }
    place = models / name
    if name in others:
        place = tmp_path / "other"
        place.mkdir()
        (place / "config.json").write_text(json.dumps(others[name]))
    with pytest.raises(SystemExit):
        main(["upcycle", f"lm:{place}/random", *words.split(), "--out", str(tmp_path / "moe")])
    assert error in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p != place] == []


def test_a_dry_run_says_what_would_be_made(models, tmp_path, capsys):
    main(["upcycle", f"lm:{models / 'Llama'}", "--experts", "4", "--dry-run"])
    said = capsys.readouterr().out
    experts = 2 * 4 * 3 * 48 * 32
    dense = sum(p.numel() for p in opened(models / "Llama").parameters())
    total = dense + experts * 3 // 4 + 2 * 4 * 32
    assert f"MixtralForCausalLM: {total / 1e6:,.2f} M parameters" in said
    assert f"{(total - experts / 2) / 1e6:,.2f} M of them for a token" in said


@pytest.mark.parametrize("groups", ["2", "3"])
def test_half_precision_stays_and_an_even_scale_loses_nothing(models, tmp_path, groups):
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "Llama", dtype="bfloat16")
    model.save_pretrained(tmp_path / "half")
    words = ["--groups", groups, "--top-k", groups, "--out", str(tmp_path / "moe")]
    main(["upcycle", f"lm:{tmp_path / 'half'}", *words])
    mixture = opened(tmp_path / "moe")
    assert mixture.dtype == torch.bfloat16
    found = error(model.eval().float(), mixture.float())
    assert found < 1e-6 if groups == "2" else 1e-6 < found < 0.01
