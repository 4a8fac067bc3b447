"""`zoo export`: what its command line says, read without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from zoo.commands.parse import parse
from zoo.files import read_json


@dataclass(frozen=True, kw_only=True)
class Export:
    run: tyro.conf.Positional[Path]
    """A run of zoo elastic, or its export; or a run of zoo distill, of images or --text, also
    before its end."""
    size: str = "full"
    """Of an elastic model: a name of the run, or words between its sizes: ffn=0.6,stream=0.75."""
    form: Literal["average", "raw"] = "average"
    """Of a run of zoo distill: the average of its weights, or those of the last step."""
    best: bool = False
    """Of a run of zoo distill with --keep-best: the checkpoint of the best evaluation, not the
    newest."""
    out: Path
    """Folder for the model; it must not exist yet."""


def main(argv: list[str]) -> None:
    """Write a run's newest checkpoint, or one size of an elastic model, as a plain checkpoint.

    Examples:
    zoo export runs/mine --out so-far
    zoo export runs/elastic --size small --out llama-small
    """
    args = parse(Export, argv, "export", main.__doc__ or "")
    if args.out.exists():
        raise ValueError(f"{args.out} is there already; choose another --out.")
    if args.size == "full" and is_distillation(args.run):
        from zoo.commands.export_checkpoint import export_checkpoint

        export_checkpoint(args.run, args.form, args.out, best=args.best)
        return
    if args.size == "full" and kind_of(args.run) == "distill_text":
        from zoo.commands.export_text import export_text

        export_text(args.run, args.form, args.out, best=args.best)
        return
    if args.best:
        raise ValueError(f"--best is for a run of zoo distill; {args.run} is none.")
    from zoo.commands.export import export

    export(args.run, args.size, args.out)


def is_distillation(run: Path) -> bool:
    """Tell whether a folder is one of a distillation of images, of a model with one size."""
    return not (run / "export" / "elastic.json").is_file() and kind_of(run) == "distill"


def kind_of(run: Path) -> str:
    """Return the task of a run; "" for another folder."""
    config = run / "config.json"
    return read_json(config).get("kind", "") if config.is_file() else ""
