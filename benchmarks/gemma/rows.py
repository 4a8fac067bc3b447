"""Rows of text that each begin as Gemma expects: with its token for a beginning.

Without it the perplexity of WikiText-2 is 89 instead of 30: the first token of a row takes the
attention that nothing else wants.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.data.text import TextSource


class Texts(NamedTuple):
    """What a benchmark may look at: `seen` for scores and training, `held` for choices and curves,
    `test` for the last figures alone."""

    seen: TextSource
    held: TextSource
    test: TextSource
    bos: int
    eos: int


def source(name: str, rows: np.ndarray, bytes_a_token: float = 1.0) -> TextSource:
    """Make a source of whole rows, [rows, length], none of which sees another."""
    count, length = rows.shape
    starts = np.arange(count + 1) * length
    return TextSource(name, rows.reshape(-1), starts, length, bytes_a_token)


def with_beginning(ids: np.ndarray, bos: int, length: int) -> np.ndarray:
    """Cut a stream of ids into rows of `length` that begin with `bos`; the rest is left out."""
    count = len(ids) // (length - 1)
    cut = ids[: count * (length - 1)].reshape(count, length - 1)
    return np.concatenate([np.full((count, 1), bos, ids.dtype), cut], axis=1)


def read_texts(folder: Path, length: int, held: float = 0.1) -> Texts:
    """Read what `unpack` wrote; the first rows of the training text are held out."""
    special = json.loads((folder / "about.json").read_text())
    found = {}
    for name in ("train", "test"):
        with np.load(folder / f"{name}.npz") as arrays:
            rows = with_beginning(arrays["ids"], special["bos"], length)
            found[name] = rows, float(arrays["bytes_a_token"])
    rows, size = found["train"]
    first = max(4, round(held * len(rows)))
    return Texts(
        source("seen", rows[first:], size),
        source("held", rows[:first], size),
        source("test", *found["test"]),
        **special,
    )


def joined(*sources: TextSource) -> TextSource:
    """Put the rows of several sources into one."""
    rows = [np.asarray(s.tokens).reshape(-1, s.length).astype(np.int32) for s in sources]
    return source("+".join(s.name for s in sources), np.concatenate(rows))
