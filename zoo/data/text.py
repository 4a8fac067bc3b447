"""Text as rows of tokens: files, documents, a stream that is tokenised once, windows of it."""

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data.arrow import STATE, parts_in, tables_in, texts
from zoo.data.arrow import SUFFIXES as TABLES
from zoo.data.feed import PlanFeed
from zoo.data.plan import Plan
from zoo.files import cache_dir, near, parse_json, save_whole
from zoo.language.tokenizers import Tokenizer
from zoo.language.tokens import ALL, Tokens

SUFFIXES = (".txt", ".jsonl", *TABLES)
HASHED = 2**24
"""Bytes of a text in memory at a time while it is hashed."""
VERSION = 2
"""Part of the cache's key: raise it when what is tokenised changes."""


class Rows(ABC):
    """Rows of tokens by their numbers."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Tokens in a row."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """Name a row."""

    @abstractmethod
    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and the segments of a row, [length] each."""

    def sample(self, count: int) -> Sequence[int]:
        """Return the numbers of so many rows that stand for all, for calibration."""
        return range(min(count, len(self)))

    @abstractmethod
    def bytes_in(self, rows: int) -> float:
        """Return the bytes that a token of the first so many rows has on average."""

    def rows(self, indices: Sequence[int] | np.ndarray, positions: Sequence[int] = ()) -> Tokens:
        """Return several rows as a batch."""
        ids, segments = zip(*(self.row(int(index)) for index in indices), strict=True)
        keys = [self.key(int(index)) for index in indices]
        stacked = [torch.from_numpy(np.stack(parts)) for parts in (ids, segments)]
        return Tokens(stacked[0], stacked[1], keys, positions)


@dataclass(frozen=True)
class TextSource(Rows):
    """Windows of a stream of tokens.

    A window is a row of `length` tokens. In a mixed source the documents stand one behind another,
    and a row holds what falls into it; otherwise each row belongs to one document, and its end is
    padding.
    """

    name: str
    tokens: np.ndarray
    """The ids of all documents, each with the id that ends it, and the one that begins it if its
    tokenizer has one."""
    starts: np.ndarray
    """Where each document begins, and where the last one ends, [documents + 1]."""
    length: int
    bytes_a_token: float
    """Of the whole text, in UTF-8."""
    mixed: bool = True
    first: int = 0
    """The windows from this one on, `count` of them."""
    count: int | None = None
    begin: int | None = None
    """What every row begins with, also in the middle of a document: Gemma's first token takes the
    attention that nothing else wants, and without this one its perplexity is three times as high.
    The first token of a row is never predicted, so this one takes its place."""

    @property
    def row_length(self) -> int:
        return self.length

    @cached_property
    def offsets(self) -> np.ndarray:
        """Number of the first window of each document, and of all windows, where not mixed."""
        lengths = -(-np.diff(self.starts) // self.length)
        return np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        if self.count is not None:
            return self.count
        # what is left behind the last whole window of a mixed stream would be a short row
        return len(self.tokens) // self.length if self.mixed else int(self.offsets[-1])

    def split(self, share: float) -> tuple["TextSource", "TextSource"]:
        """Keep the last windows apart.

        Raises:
            ValueError: one of the parts would have no window.
        """
        total = len(self)
        held = round(share * total)
        if not 0 < held < total:
            raise ValueError(
                f"{self.name} has {total} rows of {self.length} tokens, and a share of {share:g} "
                "of them is nothing or all; give more text, shorter rows (--length), or --val."
            )
        return replace(self, count=total - held), replace(self, first=total - held, count=held)

    def key(self, index: int) -> str:
        """Name a row: the text, and the number of its first token."""
        return f"{self.name}:{self._span(index)[0]}"

    def _span(self, index: int) -> tuple[int, int]:
        window = self.first + index
        if self.mixed:
            return window * self.length, (window + 1) * self.length
        document = int(np.searchsorted(self.offsets, window, side="right")) - 1
        start = int(self.starts[document]) + (window - int(self.offsets[document])) * self.length
        return start, min(start + self.length, int(self.starts[document + 1]))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and the segments of a row, [length] each."""
        start, stop = self._span(index)
        ids, segments = np.zeros(self.length, np.int64), np.full(self.length, -1, np.int64)
        ids[: stop - start] = self.tokens[start:stop]
        if self.begin is not None:
            ids[0] = self.begin
        documents = np.searchsorted(self.starts, np.arange(start, stop), side="right")
        segments[: stop - start] = documents - documents[0]
        return ids, segments

    def packed(self, mixed: bool) -> "TextSource":
        """Return the same text with several documents in a row, or one."""
        return replace(self, mixed=mixed)

    def bytes_in(self, rows: int) -> float:
        del rows  # the whole text's: a document's end has a token and no byte
        return self.bytes_a_token


@dataclass
class TextFeed(PlanFeed):
    """Rows of a text in the order of a plan."""

    source: Rows
    plan: Plan
    device: torch.device
    num_slices: int = 1
    slices: Sequence[int] = ()
    own: slice = field(default_factory=lambda: ALL)
    """The columns that this rank learns from."""

    def __post_init__(self):
        self.slices = tuple(self.slices) or tuple(range(self.num_slices))

    def batches(self, start: int, steps: int) -> Iterator[Tokens]:
        """Return the slices of the steps `start`..`steps`, one after another."""
        for step in range(start, steps):
            positions = self.plan.positions(step).reshape(self.num_slices, -1)
            for index in self.slices:
                here = positions[index]
                rows = self.source.rows(self.plan.indices_at(here), here.tolist())
                yield replace(rows.to(self.device), own=self.own)

    def counts(self, step: int) -> Mapping[str, int]:
        """Return the tokens of a batch whose next one is learnt; for `dropped`, all of them."""
        rows = self.source.rows(self.plan.indices(step))
        total = max(1, int(rows.counted.sum()))
        return defaultdict(lambda: total, dropped=rows.ids.numel())


def open_text(path: str | Path, tokenizer: Tokenizer, length: int) -> TextSource:
    """Tokenise a text, or read what an earlier call has kept in the cache.

    Args:
        path: A .txt file (one document), a .jsonl file (one a line, in its field `text`), an
            .arrow or .parquet table (one a row, in its column `text`), or a folder of them.
        length: Tokens in a row.

    Raises:
        ValueError: there is no text, a line is no JSON, or a row of `length` is longer than it.
    """
    files = _files(Path(path))
    digest = hashlib.sha256(f"{VERSION} {tokenizer.digest} {tokenizer.begin}".encode())
    for file in files:
        with file.open("rb") as content:
            while block := content.read(HASHED):
                digest.update(block)
    place = cache_dir() / "text" / digest.hexdigest()[:24]
    if not (place / "starts.npy").is_file():
        place.mkdir(parents=True, exist_ok=True)
        _tokenise(files, tokenizer, place)
    tokens, starts = (
        np.load(place / f"{name}.npy", mmap_mode="r") for name in ("tokens", "starts")
    )
    size = int(np.load(place / "bytes.npy"))
    if length < 2 or len(tokens) < length:
        raise ValueError(
            f"{path} has {len(tokens):,} tokens; a row has 2 or more of them, and not {length:,}."
        )
    predicted = len(tokens) - (len(starts) - 1 if tokenizer.begin is not None else 0)
    return TextSource(
        Path(path).name, tokens, starts, length, size / predicted, begin=tokenizer.begin
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir() and (parts := parts_in(path)):
        raise ValueError(
            f"{path} has the parts {', '.join(parts)}; give one of them ({path / parts[0]})."
        )
    if (path / STATE).is_file():
        return tables_in(path)
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = [file for file in found if file.suffix in SUFFIXES]
    if not found:
        raise ValueError(
            f"There is no text in {path}: give a {', '.join(SUFFIXES)} file, or a folder of them."
            f"{near(path)}"
        )
    return found


def _documents(file: Path) -> Iterator[str]:
    try:
        if file.suffix in TABLES:
            yield from texts(file)
            return
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(line, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}).") from error


def _document(line: str, where: str) -> str:
    text = parse_json(line, dict[str, Any], where).get("text")
    if not isinstance(text, str):
        raise ValueError(f'{where} is no document: give lines like {{"text": "..."}}.')
    return text


def _tokenise(files: list[Path], tokenizer: Tokenizer, place: Path) -> None:
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    parts, starts, size = [], [0], 0
    for file in files:
        for text in _documents(file):
            ids = [*begin, *tokenizer.encode(text), tokenizer.end]
            parts.append(np.array(ids, dtype=dtype))
            starts.append(starts[-1] + len(ids))
            size += len(text.encode())
    arrays = dict(tokens=np.concatenate(parts), bytes=np.array(size), starts=np.array(starts))
    for name, array in arrays.items():  # `starts` last: it says that all are there

        def save(content: np.ndarray, to: Path) -> None:
            with to.open("wb") as file:
                np.save(file, content)

        save_whole(array, place / f"{name}.npy", save)
