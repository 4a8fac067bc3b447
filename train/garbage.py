"""Python's garbage collector, kept from training's way."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_ON = False
"""Whether a run around has done it; Python's own count says nothing: 3.12 begins at 375."""


@contextmanager
def garbage_frozen(on: bool) -> Iterator[None]:
    """Leave all objects that are there now out of collections, if `on`.

    A full collection walks over a million objects of torch and its models, which stops all threads
    for about half a second: several steps of a GPU. What the steps make is still collected.
    """
    global _ON
    if not on or _ON:
        yield
        return
    gc.collect()
    gc.freeze()
    _ON = True
    try:
        yield
    finally:
        _ON = False
        gc.unfreeze()
