"""What a torch file may hold beside tensors: plain data, rebuilt here without running its code.

A pickle names functions and asks for them to be called. torch's weights-only reader refuses every
name that is not on a list; this module is the list that we add to it, and each entry either has
no side effect or is replaced by a stand-in of ours that has none.
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
    """Stands in for `numpy.dtype`, whose own unpickling we do not want to trust."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if not (isinstance(name, str) and _NUMBER.fullmatch(name)):
            raise ValueError(f"the numpy type {name!r} is not a plain number")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _number(kind: _NumberType, raw: bytes) -> bool | int | float | complex:
    """Stand in for numpy's `scalar`: give the Python number."""
    return np.frombuffer(raw, np.dtype(kind.order + kind.name))[0].item()


def _member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    """Look a member up; unlike the class itself, this cannot be made to change one."""
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
    # A path of another system cannot be built here, and a file should not get one that acts.
    *((pure, name) for name, pure in _PATHS.items()),
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
"""Classes for `torch.serialization.safe_globals`, with the name that a file gives them."""


def _loaded_enum(name: str) -> type[enum.Enum] | None:
    """The enum of that name in a module that is already imported; nothing is imported for it."""
    module, _, attribute = name.rpartition(".")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None


def strange_names(path: Path) -> list[str]:
    """Name what a torch file asks for that is not plain data; nothing of it is loaded.

    Files of torch before 1.6 are not looked into: they give an empty list.
    """
    with torch.serialization.safe_globals(PLAIN):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # a damaged or hostile file may raise anything; its reader will say so
            return []


def enums(names: Iterable[str]) -> list[tuple[Callable, str]]:
    """Return the entries that let the members of already imported enums through."""
    found = {name: _loaded_enum(name) for name in names}
    return [(partial(_member, kind), name) for name, kind in found.items() if kind]
