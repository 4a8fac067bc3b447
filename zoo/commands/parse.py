"""Reading a sub-command's arguments: one way for all of them."""

from typing import Any

import tyro


def parse(kind: Any, argv: list[str], command: str, about: str, **kwargs: Any) -> Any:
    """Read `argv` as fields of the dataclass `kind`; --help shows `about`."""
    return tyro.cli(kind, args=argv, prog=f"zoo {command}", description=about, **kwargs)


def resolve_device(name: str) -> str:
    """Resolve `auto`, and refuse a device that is not here.

    Raises:
        ValueError: this machine or this torch does not have it.
    """
    import torch

    found = ["cpu"]
    found += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if "cuda" in found else "cpu"
    if name not in found:
        raise ValueError(f"There is no device {name!r} here; give {', '.join(found)}.")
    return name
