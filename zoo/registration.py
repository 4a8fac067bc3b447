"""Tell timm the names of zoo's families as soon as timm is there, and not before.

timm brings torch and torchvision: seconds and a gigabyte, which `zoo --help` need not pay. So
`import zoo` imports neither. Where timm is imported already, the families follow at once;
otherwise they follow when it is.

Modules that a family is made of import timm as well, `zoo.hierarchy` for one. When such a module is
the first to do so it is half imported itself, and a family would find it empty. So the families
wait until this thread is in no module of zoo's own any more.
"""

from importlib import import_module
from types import ModuleType

from zoo.import_hook import once_imported

FAMILIES = ("eradio", "fastervit", "mambavision", "radio")
"""Modules of zoo, and what `timm.list_models(module=...)` calls them."""


def register() -> tuple[ModuleType, ...]:
    """Import the families, which registers their models with timm."""
    return tuple(import_module(f"zoo.{name}") for name in FAMILIES)


def register_with_timm() -> None:
    """Register the families now if timm is imported, otherwise right after it is."""
    once_imported("timm", register, outside="zoo.")
