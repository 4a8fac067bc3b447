"""Tell timm the names of zoo's families as soon as timm is there, and not before.

timm brings torch and torchvision: seconds and a gigabyte, which `zoo --help` need not pay. So
`import zoo` imports neither. Where timm is imported already, the families follow at once;
otherwise they follow when it is.

Modules that a family is made of import timm as well, `zoo.hierarchy` for one. When such a module is
the first to do so it is half imported itself, and a family would find it empty. So the families
wait until this thread is in no module of zoo's own any more.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from zoo.import_hook import ImportHook

FAMILIES = ("eradio", "fastervit", "mambavision", "radio")
"""Modules of zoo, and what `timm.list_models(module=...)` calls them."""


def register() -> tuple[ModuleType, ...]:
    """Import the families, which registers their models with timm."""
    return tuple(import_module(f"zoo.{name}") for name in FAMILIES)


def register_with_timm() -> None:
    """Register the families now if timm is imported, otherwise right after it is."""
    if "timm" in sys.modules:
        register()
    else:
        ImportHook(lambda name: name == "timm" or name.startswith("zoo."), _Waiting()).install()


class _Waiting:
    """Around each import of timm and of zoo's modules, until the families are registered."""

    def __init__(self):
        self._has_timm = self._is_done = False
        self._thread = threading.local()

    @contextmanager
    def __call__(self, module: ModuleType) -> Iterator[None]:
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            yield
            self._has_timm |= module.__name__ == "timm"
        finally:
            self._thread.depth = depth
            if self._has_timm and not depth and not self._is_done:
                self._is_done = True
                register()
