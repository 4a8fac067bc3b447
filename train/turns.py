"""How long a thread beside training may keep Python's lock from it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

TURN = 0.0001
"""Seconds. Training lends the lock at each operator that it launches, and gets it back after this
much of another thread's Python: five milliseconds as Python comes, in which a GPU runs dry."""


@contextmanager
def short_turns(on: bool) -> Iterator[None]:
    """Let threads change places more often, if `on`."""
    before = sys.getswitchinterval()
    if on:
        sys.setswitchinterval(min(before, TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
