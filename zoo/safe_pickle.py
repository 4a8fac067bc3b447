"""Plain data that a torch file may hold beside tensors, loaded without running the file's code.

A pickle names functions to call. torch's weights-only reader refuses every name that is not on its
list; this module is the list that we add. Each entry either has no side effect or is replaced by a
stand-in of ours that has none.
"""

import argparse
import datetime
import enum
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NUMBER = re.compile(r"[biufc]\d{1,2}")
"""numpy's short names of the types whose scalars are plain numbers."""


class _NumberType:
    """Stand-in for `numpy.dtype`, whose own unpickling we do not trust."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if not (isinstance(name, str) and _NUMBER.fullmatch(name)):
            raise ValueError(f"the numpy type {name!r} is not a plain number")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _number(kind: _NumberType, raw: bytes) -> bool | int | float | complex:
    """Stand in for numpy's `scalar`: return the Python number."""
    return np.frombuffer(raw, np.dtype(kind.order + kind.name))[0].item()


def _member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    """Look up a member of an enum; unlike its class, this cannot be made to change one."""
    return kind(value)


_PATHS = {
    f"{module}.{name}": pure
    for module in ("pathlib", "pathlib._local")  # Python 3.13 moved the classes for a while
    for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath)
    for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
}

PLAIN: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    types.SimpleNamespace,
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
    (frozenset, "builtins.frozenset"),
    (range, "builtins.range"),
    (slice, "builtins.slice"),
    # Pure paths: those of another system cannot be built here, and a file needs none that act.
    *((pure, name) for name, pure in _PATHS.items()),
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
"""For `torch.serialization.safe_globals`: classes, with the names that files have for them."""


def _loaded_enum(name: str) -> type[enum.Enum] | None:
    """Find the enum of that name in a module that is imported already; nothing is imported."""
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None


def strange_names(path: Path) -> list[str]:
    """Return the names in a torch file that are not plain data, without loading any of it.

    Files of torch before 1.6 are not searched: the list is empty for them.
    """
    with torch.serialization.safe_globals(PLAIN):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # a damaged or hostile file may raise anything; its reader will say so
            return []


def enums(names: Iterable[str]) -> list[tuple[Callable, str]]:
    """Return entries that let members of enums through, for those enums that are imported."""
    found = {name: _loaded_enum(name) for name in names}
    return [(partial(_member, kind), name) for name, kind in found.items() if kind]
