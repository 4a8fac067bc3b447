"""Python's garbage collector, kept from training's way."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_frozen(on: bool) -> Iterator[None]:
    """Leave all objects that are there now out of collections, if `on`.

    A full collection walks over a million objects of torch and its models, which stops all threads
    for about half a second: several steps of a GPU. What the steps make is still collected.
    """
    if not on or gc.get_freeze_count():  # or the run around this one has done it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
