"""Batches of tokens, and what is read of a language model."""

import pytest
import torch

import zoo
from zoo.language.open import open_language_model
from zoo.language.tokenizers import open_tokenizer
from zoo.language.tokens import Tokens, check_features, read_tokens, separates_documents

transformers = pytest.importorskip("transformers")


def tiny(kind: str = "Llama", **changes):
    """Build a tiny causal language model of transformers."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_row_knows_its_documents_and_what_can_be_learnt():
    row = Tokens(torch.tensor([[5, 6, 7, 8, 9, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1, -1, -1]]))
    assert row.places[0, :5].tolist() == [0, 1, 0, 1, 2]
    assert row.counted[0].tolist() == [True, False, True, True, False, False, False]
    assert row.following[0, :4].tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3Text", "Mistral"])
def test_documents_in_one_row_do_not_see_each_other(kind):
    model = tiny(kind)
    assert separates_documents(model)
    ids = torch.arange(11)[None]
    segments = torch.tensor([[0] * 4 + [1] * 7])
    both = read_tokens(model, Tokens(ids, segments)).last
    for part in (slice(0, 4), slice(4, 11)):
        alone = read_tokens(model, Tokens(ids[:, part], torch.zeros_like(ids[:, part]))).last
        torch.testing.assert_close(both[:, part], alone, atol=2e-6, rtol=1e-5)


def test_a_recurrent_model_is_known_to_carry_its_state_on():
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes)).eval()
    assert not separates_documents(model)


def test_hidden_states_times_the_head_are_the_logits():
    model = tiny()
    ids = torch.randint(61, (2, 9))
    last, head, _ = read_tokens(model, Tokens(ids, torch.zeros_like(ids)))
    torch.testing.assert_close(last @ head.T, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "name, scale", [("falcon_h1", "lm_head_multiplier"), ("granitemoehybrid", "logits_scaling")]
)
def test_a_constant_on_the_logits_is_one_on_the_head(name, scale):
    check_features(zoo.create_model(f"{name}_tiny", **{scale: 7.0}).eval(), name)


def test_a_model_that_caps_its_logits_is_refused():
    model = tiny("Gemma2", final_logit_softcapping=0.05)
    with pytest.raises(ValueError, match="caps, scales or shifts"):
        check_features(model, "gemma2")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        open_language_model(f"lm:{tmp_path}")


def test_an_encoders_tokenizer_ends_texts_with_its_separator(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "[CLS]": 1, "[SEP]": 2, "?": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pair = [("[CLS]", 1), ("[SEP]", 2)]
    inner.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, pair)
    marks = dict(cls_token="[CLS]", sep_token="[SEP]")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    fast.save_pretrained(tmp_path)
    found = open_tokenizer(str(tmp_path))
    assert (found.begin, found.end, found.encode("a a")) == (1, 2, [0, 0])
