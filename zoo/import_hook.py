"""Run something around the import of chosen modules, without importing them."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Around = Callable[[ModuleType], AbstractContextManager[None]]


class ImportHook(MetaPathFinder):
    """A finder that wraps what the finders behind it find.

    Args:
        wants: Whether a module of this name is one of the chosen.
        around: The context in which a chosen module's code runs.
    """

    def __init__(self, wants: Callable[[str], bool], around: Around):
        self._wants, self._around = wants, around

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self._wants(name):
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Wrapped(spec.loader, self._around)
                return spec
        return None

    def install(self) -> None:
        """Ask this finder before all others."""
        sys.meta_path.insert(0, self)


class _Wrapped(Loader):
    def __init__(self, loader: Any, around: Around):
        self._loader, self._around = loader, around

    def __getattr__(self, name: str) -> Any:  # get_source, get_code, resources
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader  # no trace of us is left
        with self._around(module):
            self._loader.exec_module(module)
