"""How language models keep the documents of a row apart, in each form, against a mask."""

import pytest
import torch

import zoo
from zoo.kernels.packed_attention import Pieces
from zoo.language.attention import candidates, documents, ours, set_attention
from zoo.language.tokens import Tokens, read_tokens

pytest.importorskip("transformers")
from transformers.masking_utils import (
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

FAMILIES = ("llama", "qwen3", "gemma3", "mixtral", "nemotron", "zamba2", "granitemoehybrid")


def rows() -> Tokens:
    torch.manual_seed(1)
    segments = torch.tensor([[0] * 3 + [1] * 14 + [2] * 7, [0] * 20 + [-1] * 4])
    return Tokens(torch.randint(200, segments.shape), segments)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_answers_and_learns_alike_without_a_mask(family):
    torch.manual_seed(0)
    model = zoo.create_model(f"{family}_tiny").eval()
    tokens, found = rows(), []
    for form in ("sdpa", "split"):
        assert set_attention(model, form, family) == form
        last = read_tokens(model, tokens).last
        last[tokens.segments >= 0].square().mean().backward()
        weights = [p for p in model.parameters() if p.grad is not None]
        found.append([last.detach(), *(p.grad.clone() for p in weights)])
        model.zero_grad()
    assert model.config._attn_implementation == ours("split")
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=2e-6)


def test_documents_begin_where_a_token_does_not_see_the_one_before():
    packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]]))

    def sees(*index):
        return packed(*index) & causal_mask_function(*index)

    found = documents(2, 4, 4, mask_function=sees)
    assert isinstance(found, Pieces) and found.causal and found.window is None
    assert found.lengths == (2, 2, 1, 2, 1)
    windowed = documents(
        1, 4, 4, mask_function=sliding_window_causal_mask_function(2), local_size=2
    )
    assert isinstance(windowed, Pieces) and (windowed.lengths, windowed.window) == ((4,), 2)


def test_tokens_that_see_later_ones_are_refused():
    with pytest.raises(ValueError, match="see later ones"):
        documents(1, 4, 4, mask_function=lambda b, h, q, k: q >= 0)


def test_generation_is_the_same_with_and_without_padding_and_a_cache():
    torch.manual_seed(0)
    model = zoo.create_model("gemma3_tiny").eval()
    ids, mask = torch.randint(1, 200, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    before = model.generate(ids, **options)
    set_attention(model, "split", "gemma3")
    assert torch.equal(model.generate(ids, **options), before)


def test_nothing_changes_on_a_cpu_and_a_recurrent_model_has_no_attention():
    model = zoo.create_model("llama_tiny")
    assert not candidates(model)
    assert set_attention(model, "auto", "llama") == "sdpa" == model.config._attn_implementation
    assert set_attention(zoo.create_model("mamba2_tiny"), "auto", "mamba2") == "none"


@pytest.mark.parametrize("name", ["mamba2_tiny", "hyena_tiny"])
def test_a_model_without_attention_of_transformers_refuses_a_form(name):
    with pytest.raises(ValueError, match="it has no attention that transformers looks up"):
        set_attention(zoo.create_model(name), "split", name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["varlen", "xformers"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on CUDA")
def test_a_form_that_does_not_run_here_is_refused_and_the_model_stays(form):
    model = zoo.create_model("llama_tiny").eval()
    with pytest.raises(ValueError, match=f"{form} does not run with llama here: it is for CUDA"):
        set_attention(model, form, "llama")
    assert model.config._attn_implementation == "sdpa"


def test_a_form_that_answers_otherwise_is_refused(monkeypatch):
    model = zoo.create_model("llama_tiny").eval()
    whole = Pieces((320,), torch.device("cpu"), causal=True)  # a row that sees all before it
    monkeypatch.setattr("zoo.language.attention.documents", lambda *_, **__: whole)
    with pytest.raises(ValueError, match=r"features differ by \d"):
        set_attention(model, "split", "llama")


def test_dropout_inside_attention_is_left_to_sdpa():
    model = zoo.create_model("llama_tiny", attention_dropout=0.1).eval()
    with pytest.raises(ValueError, match=r"drops 0\.1 of its attention"):
        set_attention(model, "split", "llama")


@pytest.mark.filterwarnings("ignore")  # that it is not compiled, which takes half a minute
def test_flex_attention_answers_alike_and_is_refused_to_who_learns_on_a_cpu():
    torch.manual_seed(0)
    model, tokens = zoo.create_model("llama_tiny").eval(), rows()
    before = read_tokens(model, tokens).last.detach()
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(ValueError, match="does not support backward on CPU"):
            set_attention(model, "flex", "llama")
        assert model.config._attn_implementation == "sdpa"
        assert set_attention(model.requires_grad_(False), "flex", "llama") == "flex"
        torch.testing.assert_close(read_tokens(model, tokens).last, before, rtol=1e-4, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, xformers' kernels
@pytest.mark.parametrize("form", ["auto", "split", "flex", "varlen", "xformers"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_form_answers_and_learns_alike_on_a_gpu(form):
    torch.manual_seed(0)
    changes = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    model = zoo.create_model("llama_tiny", **changes).cuda().bfloat16()
    tokens, found = rows().to("cuda"), []
    for choice in ("sdpa", form):
        try:
            chosen = set_attention(model, choice, "llama")
        except ValueError as reason:
            pytest.skip(str(reason))
        last = read_tokens(model, tokens).last
        last.float()[tokens.segments >= 0].square().mean().backward()
        grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
        found.append([last.float(), *grads])
        model.zero_grad()
    assert form != "auto" or chosen != "sdpa"
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.03 * a.norm()
