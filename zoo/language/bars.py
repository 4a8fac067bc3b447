"""The bars that transformers draws while it reads and writes weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGE = 2**30
"""Bytes of weights for which a bar is worth its line: some seconds."""


@contextmanager
def bars_for_large(what: Any) -> Iterator[None]:
    """Within this context transformers draws no bars if the weights are few.

    They take a moment then, and a bar in a log is a line of control characters.

    Args:
        what: A model that is written, or the folder that is read. A name of the Hub keeps its bars.
    """
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled() or bytes_of(what) >= LARGE:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def bytes_of(what: Any) -> float:
    """Return the bytes of a model's weights, or of a folder's; infinity for what is not here."""
    if isinstance(what, str | Path):
        files = [*Path(what).glob("*.safetensors"), *Path(what).glob("*.bin")]
        return sum(file.stat().st_size for file in files) if Path(what).is_dir() else float("inf")
    return sum(p.numel() * p.element_size() for p in what.parameters())
