"""Reading a sub-command's arguments: one way for all of them."""

from typing import Any

import tyro


def parse(kind: Any, args: list[str], command: str, about: str, **kwargs: Any) -> Any:
    """Read `args` as fields of the dataclass `kind`; --help shows `about`."""
    return tyro.cli(kind, args=args, prog=f"zoo {command}", description=about, **kwargs)


def resolve_device(asked: str) -> str:
    """Resolve `auto`, and refuse a device that is not there."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = ("cuda" if has_gpu else "cpu") if asked == "auto" else asked
    if device not in ("cpu", "cuda") or (device == "cuda" and not has_gpu):
        raise ValueError(f"There is no device {device!r} here; give cpu{', cuda' * has_gpu}.")
    return device
