"""Experiments that make their own teachers: what was claimed, tried again with intervals."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType

EXPERIMENTS: Mapping[str, Callable[[], ModuleType]] = {
    name: lambda name=name: import_module(f"zoo.experiments.{name}.run")
    for name in ("phi_s", "students")
}
"""Name -> what imports it: a module with `full` and `tiny` (configs), `plan` (prints) and `main`
(runs, and tells whether what was promised was seen)."""
