"""What `zoo plan` and `zoo launch` share: options of their own among those of `zoo distill`."""

from collections.abc import Collection
from typing import Any

from zoo.commands.distill.args import is_text, read_args
from zoo.commands.parse import parse
from zoo.train.distill.config import Distill


def read_words(
    kind: Any, argv: list[str], command: str, about: str, *, flags: Collection[str] = ()
) -> tuple[Any, list[str]]:
    """Read the fields of a dataclass; return it, and the words that are for `zoo distill`.

    Args:
        flags: Options without a value; each other one has a word behind it, or numbers.
    """
    options = {f"--{name.replace('_', '-')}" for name in kind.__dataclass_fields__} | {"--help"}
    own, rest, words = [], [], ["--help" if word == "-h" else word for word in argv]
    while words:
        word = words.pop(0)
        if word.partition("=")[0] not in options:
            rest.append(word)
            continue
        own.append(word)
        if "=" not in word and word not in flags and words:
            own.append(words.pop(0))
            while own[-1].isdigit() and words and words[0].isdigit():
                own.append(words.pop(0))
    return parse(kind, own, command, about), rest


def read_stages(words: list[str], command: str) -> dict[str, Distill]:
    """Read a recipe and its options as `zoo distill` does.

    Raises:
        ValueError: as `zoo distill`; or they are not those of a new run on images.
    """
    for word in words:
        if (option := word.partition("=")[0]) in ("--text", "--resume", "--dry-run"):
            raise ValueError(f"zoo {command} takes a recipe of images; leave out {option}.")
    assert not is_text(words)
    return read_args(words).stages
