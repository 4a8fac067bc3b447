"""Run something around or after the import of chosen modules, without importing them."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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


def once_imported(
    name: str, action: Callable[[], object], *, outside: str | tuple[str, ...]
) -> None:
    """Run an action now if a module is imported already, otherwise right after it is, once.

    Args:
        outside: Prefixes of modules that may be half imported when that happens, and that the
            action needs whole: it waits until this thread is in none of them.
    """
    if name in sys.modules:
        action()
    else:
        wanted = _Waiting(name, action)
        ImportHook(lambda found: found == name or found.startswith(outside), wanted).install()


class _Waiting:
    """Around each import of a module and of those to be outside of, until the action has run."""

    def __init__(self, name: str, action: Callable[[], object]):
        self._name, self._action = name, action
        self._is_imported = self._is_done = False
        self._thread = threading.local()

    @contextmanager
    def __call__(self, module: ModuleType) -> Iterator[None]:
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            yield
            self._is_imported |= module.__name__ == self._name
        finally:
            self._thread.depth = depth
            if self._is_imported and not depth and not self._is_done:
                self._is_done = True
                self._action()
