"""Text as rows of tokens."""

import json

import numpy as np
import pytest
import torch

from zoo.data.plan import Plan
from zoo.data.text import TextFeed, open_text
from zoo.language.tokenizers import ByteTokenizer, open_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_every_token_of_every_document_is_in_exactly_one_row(tmp_path):
    texts = ["abcdefg", "h", "ij", "klmnopqrstuv"]
    path = write(tmp_path / "t.jsonl", texts)
    whole = [*b"abcdefg", 256, *b"h", 256, *b"ij", 256, *b"klmnopqrstuv", 256]
    for mixed in (True, False):
        source = open_text(path, ByteTokenizer(), 4)
        source = type(source)(**{**vars(source), "mixed": mixed, "name": "t"})
        rows = source.rows(range(len(source)))
        kept = rows.ids[rows.segments >= 0].tolist()
        assert kept == whole[: len(kept)]
        assert len(whole) - len(kept) < (4 if mixed else 1)
    assert rows.segments.max() == 0  # one document a row


def test_rows_begin_as_the_tokenizer_does_and_nothing_else_changes_its_place(tmp_path):
    path = write(tmp_path / "t.jsonl", ["abc", "defghij"])
    tokenizer = ByteTokenizer()
    plain = open_text(path, tokenizer, 4)
    tokenizer.begin = 300
    source = open_text(path, tokenizer, 4)
    assert source.rows(range(3)).ids.tolist() == [
        [300, *b"abc"],
        [300, 300, *b"de"],  # 256, which ended the first document, gave way
        [300, *b"ghi"],
    ]
    assert source.rows([1]).segments.tolist() == [[0, 1, 1, 1]]
    assert source.rows([1]).counted.tolist() == [[False, True, True, False]]
    assert source.bytes_a_token == plain.bytes_a_token


def test_segments_change_where_a_document_ends(tmp_path):
    source = open_text(write(tmp_path / "t.jsonl", ["abc", "d", "efghi"]), ByteTokenizer(), 6)
    ids, segments = source.row(0)
    assert ids.tolist() == [*b"abc", 256, *b"d", 256]
    assert segments.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_text_is_tokenised_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("hello world, hello world")
    first = open_text(path, ByteTokenizer(), 4)
    assert first.bytes_a_token == pytest.approx(24 / 25)
    monkeypatch.setattr(ByteTokenizer, "encode", None)
    assert np.array_equal(open_text(path, ByteTokenizer(), 8).tokens, first.tokens)
    path.write_text("another text altogether")
    with pytest.raises(TypeError):
        open_text(path, ByteTokenizer(), 4)


def test_the_slices_of_a_step_are_its_batch_and_its_count(tmp_path):
    path = write(tmp_path / "t.jsonl", ["abcdefghij" * 9, "xyz" * 30])
    source = open_text(path, ByteTokenizer(), 8)
    plan = Plan(len(source), 4, 0)
    whole = next(TextFeed(source, plan, torch.device("cpu")).batches(3, 4))
    feed = TextFeed(source, plan, torch.device("cpu"), num_slices=2)
    parts = list(feed.batches(3, 4))
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    assert feed.counts(3)["any"] == int(whole.counted.sum())


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}\n", "line 1 is no document"), ('{"text": 3}\n', "line 1"), ("[" * 9999, "line 1")],
)
def test_a_line_that_is_no_document_is_named(tmp_path, content, message):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_text(path, ByteTokenizer(), 4)


def test_text_that_is_not_there_or_too_short_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no text"):
        open_text(tmp_path, ByteTokenizer(), 4)
    (tmp_path / "t.txt").write_text("ab")
    with pytest.raises(ValueError, match="has 3 tokens"):
        open_text(tmp_path, ByteTokenizer(), 4)
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        open_text(tmp_path, ByteTokenizer(), 4)
    with pytest.raises(ValueError, match="There is no tokenizer"):
        open_tokenizer(str(tmp_path))
