"""Reading a sub-command's arguments: one way for all of them."""

from typing import Any

import tyro


def parse(kind: Any, argv: list[str], command: str, about: str, **kwargs: Any) -> Any:
    """Read `argv` as fields of the dataclass `kind`; --help shows `about`."""
    return tyro.cli(kind, args=argv, prog=f"zoo {command}", description=about, **kwargs)


def resolve_device(name: str) -> str:
    """Resolve `auto`, and refuse a device that speed cannot be measured on.

    Raises:
        ValueError: it is not here, or torch does not time it.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name == "mps":
        raise ValueError("Speed is measured on cpu and cuda; device mps is not waited for.")
    if name not in ("cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise ValueError(f"There is no device {name!r} here; give cpu{', cuda' * has_gpu}.")
    return name
