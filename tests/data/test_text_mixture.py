"""Several texts in one stream."""

from collections import Counter

import pytest
import torch

from zoo.data.text import TextFeed
from zoo.data.text_mixture import TextMixture, open_texts, plan_of_rows
from zoo.language.tokenizers import open_tokenizer


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("a" * 400)
    (tmp_path / "b.txt").write_text("b" * 4000)
    (tmp_path / "c.txt").write_text("\u00e9" * 800)  # two bytes each
    return tmp_path


def opened(texts, words: str, **options) -> TextMixture:
    named = ",".join(f"{texts}/{word}" for word in words.split(","))
    mixture = open_texts(named, open_tokenizer("bytes"), 10, **options)
    assert isinstance(mixture, TextMixture)
    return mixture


def letters(tokens) -> list[str]:
    return [chr(row[0]) for row in tokens.ids]


def test_each_text_has_its_share_of_every_stretch_and_all_its_rows_in_a_pass(texts):
    mixture = opened(texts, "a.txt=0.7,b.txt=0.3")
    plan = plan_of_rows(mixture, 20, seed=3)
    feed = TextFeed(mixture, plan, torch.device("cpu"))
    steps = list(feed.batches(0, 6))
    for batch in steps:
        assert Counter(letters(batch)) == {"a": 14, "b": 6}
    keys = [key for batch in steps for key in batch.keys if key.startswith("a.txt")]
    assert len(keys[:40]) == len(set(keys[:40])) == 40  # the short one's pass; then another
    assert set(keys[40:80]) == set(keys[:40]) and keys[40:80] != keys[:40]


def test_a_resumed_stream_is_the_same(texts):
    mixture = opened(texts, "a.txt=2,b.txt=1")
    feed = TextFeed(mixture, plan_of_rows(mixture, 6, seed=0), torch.device("cpu"))
    whole = [batch.keys for batch in feed.batches(0, 8)]
    assert [batch.keys for batch in feed.batches(5, 8)] == whole[5:]


def test_what_is_held_out_is_a_mixture_too_and_so_is_what_is_looked_at_first(texts):
    mixture = opened(texts, "a.txt=1,b.txt=1")
    train, held = mixture.split(0.1)
    assert (train.lengths, held.lengths) == ((36, 360), (4, 40))
    assert Counter(letters(held.rows(range(8)))) == {"a": 4, "b": 4}
    assert Counter(letters(train.rows(train.sample(20)))) == {"a": 10, "b": 10}
    seen = {train.key(i) for i in range(len(train))}
    assert not seen & {held.key(i) for i in range(len(held))}


def test_bytes_a_token_are_those_of_the_rows_that_are_measured(texts):
    mixture = opened(texts, "a.txt=1,c.txt=1", in_turn=True)
    one, two = (part.bytes_a_token for part in mixture.parts)
    assert mixture.bytes_in(20) == pytest.approx((one + two) / 2)
    everything = (40 * one + len(mixture.parts[1]) * two) / len(mixture)
    assert mixture.bytes_in(10**6) == pytest.approx(everything)


def test_a_weight_that_is_none_is_refused(texts):
    with pytest.raises(ValueError, match="no source with a weight above 0"):
        opened(texts, "a.txt=1,b.txt=0")
