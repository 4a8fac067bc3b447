"""Experiments that train their own teachers: claims of papers, repeated over seeds."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType

EXPERIMENTS: Mapping[str, Callable[[], ModuleType]] = {
    name: lambda name=name: import_module(f"zoo.experiments.{name}.run")
    for name in ("phi_s", "students")
}
"""Name -> a function that imports the experiment: a module with `full` and `tiny` (which return
configs), `plan` (prints what would run) and `main` (runs, and returns whether the claim held)."""
