"""Rows that a student writes itself: its own tokens, the same ones again, and what is learnt."""

import numpy as np
import pytest
import torch

from zoo.data.plan import Plan
from zoo.data.text import TextFeed, TextSource
from zoo.language.tokens import Tokens, read_tokens
from zoo.train.distill.on_policy import OnPolicyFeed, OwnText
from zoo.train.distill.token_config import OnPolicy

transformers = pytest.importorskip("transformers")
END = 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def rows() -> Tokens:
    ids = torch.randint(11, (4, 24), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros_like(ids)
    segments[0, 5:] = 1  # two documents, and one that ends early
    segments[1, 9:] = -1
    return Tokens(ids, segments, positions=(8, 9, 10, 11))


def own(fraction: float = 1.0, temperature: float = 0.0) -> OwnText:
    return OwnText(OnPolicy(fraction=fraction, length=8, temperature=temperature), 0, END)


def test_with_all_rows_its_own_every_token_that_counts_is_what_the_student_would_write(model):
    tokens, counted, texts = own().mixed(model, rows(), 0)
    features = read_tokens(model, tokens)
    likeliest = (features.last @ features.head.T).argmax(-1)
    assert (likeliest == tokens.following)[counted].all()
    assert not texts.any()
    assert 8 < counted.sum() <= 4 * 8
    before = rows()
    assert torch.equal(tokens.ids[[0, 2, 3], :16], before.ids[[0, 2, 3], :16])
    assert torch.equal(tokens.ids[1, :9], before.ids[1, :9])  # behind the end of its document
    assert (tokens.segments[1, 9:17] == 0).all() and (tokens.segments[1, 17:] == -1).all()


def test_samples_are_a_function_of_seed_step_and_rows_and_leave_the_generator_alone(model):
    torch.manual_seed(5)
    first = own(temperature=1.0).mixed(model, rows(), 3)[0].ids
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first, own(temperature=1.0).mixed(model, rows(), 3)[0].ids)
    assert not torch.equal(first, own(temperature=1.0).mixed(model, rows(), 4)[0].ids)


def test_samples_have_the_students_frequencies(model):
    tokens = rows()
    many = Tokens(tokens.ids[2:3].expand(4000, -1), tokens.segments[2:3].expand(4000, -1),
                  positions=(0,))  # fmt: skip
    found = own(temperature=2.0).mixed(model, many, 0)[0].ids[:, 16]
    features = read_tokens(model, Tokens(tokens.ids[2:3], tokens.segments[2:3]))
    wanted = (features.last[0, 15] @ features.head.T / 2).softmax(-1)
    share = torch.bincount(found, minlength=12) / 4000
    assert (share - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_behind_an_end_nothing_is_learnt(model):
    tokens, counted, _ = own(temperature=5.0).mixed(model, rows(), 1)
    ends = 0
    for row, start in enumerate((16, 9, 16, 16)):
        written = tokens.ids[row, start : start + 8].tolist()
        kept = written.index(END) + 1 if END in written else 8
        ends += kept < 8
        assert counted[row].nonzero().flatten().tolist() == [*range(start - 1, start - 1 + kept)]
    assert ends


def test_rows_of_the_text_stay_and_the_shares_add_up(model):
    tokens, counted, texts = own(0.5).mixed(model, rows(), 0)
    assert torch.equal(tokens.ids[2:], rows().ids[2:])
    assert torch.equal(counted[2:], rows().counted[2:]) and torch.equal(counted[2:], texts[2:])
    some = own(0.3)
    assert sum(some.number(step, 5) for step in range(20)) == 30


def test_a_feed_counts_what_may_be_learnt():
    source = TextSource("x", np.arange(96) % 11, np.array([0, 96]), 24, 1.0)
    feed = TextFeed(source, Plan(4, 4, 0), torch.device("cpu"), 2, (0, 1))
    counts = OnPolicyFeed(feed, own(0.5)).counts(0)
    assert counts["parent/kl"] == 2 * 23 + 2 * 8 and counts["ce"] == 2 * 23
    assert OnPolicyFeed(feed, own(1.0)).counts(0)["parent/kl"] == 4 * 8
