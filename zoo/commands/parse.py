"""Reading a sub-command's arguments: one way for all of them."""

from typing import Any

import tyro


def parse(kind: Any, args: list[str], command: str, about: str, **kwargs: Any) -> Any:
    """Read `args` as fields of the dataclass `kind`; --help shows `about`."""
    return tyro.cli(kind, args=args, prog=f"zoo {command}", description=about, **kwargs)
