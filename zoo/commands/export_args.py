"""`zoo export`: what its command line says, read without torch."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class Export:
    run: tyro.conf.Positional[Path]
    """A run of zoo elastic, or its export."""
    size: str = "full"
    """A name of the run, or words between its sizes: ffn=0.6,stream=0.75."""
    out: Path
    """Folder for the model; it must not exist yet."""


def main(argv: list[str]) -> None:
    """Write one size of an elastic model as a plain checkpoint of timm or transformers.

    Example:
    zoo export runs/elastic --size small --out llama-small
    """
    args = parse(Export, argv, "export", main.__doc__ or "")
    if args.out.exists():
        raise ValueError(f"{args.out} is there already; choose another --out.")
    from zoo.commands.export import export

    export(args.run, args.size, args.out)
