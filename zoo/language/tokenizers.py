"""Tokenizers: bytes, which need no file, and those of transformers."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from zoo.language.towers import fetch, is_language_model, is_repository, released_weights

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them tells that a folder has a tokenizer."""
FETCHED = ("config.json", "tokenizer*", "vocab*", "merges*", "special_tokens*", "*.jinja")
"""Files of a repository that a tokenizer is made of."""
BYTES = "bytes"


class Tokenizer(Protocol):
    """Text to ids."""

    size: int
    """Number of ids."""
    begin: int | None
    """The id that a document begins with, if the tokenizer sets one."""
    end: int
    """The id that ends a document."""
    digest: str
    """Says whether two are the same."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ones."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and one id that ends a document."""

    size, end, digest = 257, 256, BYTES
    begin: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FolderTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.inner: Any = AutoTokenizer.from_pretrained(folder)
        self.size = len(self.inner)
        # An encoder's (BERT's) are called otherwise: [SEP] and [CLS].
        ends = (self.inner.eos_token_id, self.inner.sep_token_id)
        end = next((e for e in ends if e is not None), None)
        if end is None:
            raise ValueError(f"The tokenizer in {folder} has no token that ends a text (eos).")
        self.end = int(end)
        bos: Any = self.inner.bos_token_id
        bos = self.inner.cls_token_id if bos is None else bos
        sets = bos is not None and self.inner.encode("a", verbose=False)[:1] == [bos]
        self.begin: int | None = bos if sets else None
        vocabulary = sorted(self.inner.get_vocab().items(), key=lambda item: item[1])
        self.digest = hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def open_tokenizer(name: str) -> Tokenizer:
    """Open `bytes`, the tokenizer in a folder, or that of a repository on the Hub (`owner/name`) or
    of a released model of zoo's table (`qwen3_8b`).

    Raises:
        ValueError: there is none, or it cannot be fetched.
    """
    if name == BYTES:
        return ByteTokenizer()
    folder = Path(name)
    if is_language_model(name) and not folder.exists():
        folder = fetch(released_weights(name), FETCHED)
    elif is_repository(name) and "/" in name:
        folder = fetch(name, FETCHED)
    if not has_tokenizer(folder):
        raise ValueError(
            f"There is no tokenizer in {name} (none of {', '.join(FILES)}); give the folder of "
            "one, a repository on the Hub (owner/name), or bytes."
        )
    return FolderTokenizer(folder)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a tokenizer."""
    return any((folder / file).is_file() for file in FILES)
