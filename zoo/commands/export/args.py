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
    to: Literal["timm", "transformers", "onnx", "pt2", "hub"] | None = None
    """Of an exported student, or a finished run of zoo distill: another form, with a model card."""
    repo: str = ""
    """For --to hub: ORG/NAME."""
    results: Path | None = None
    """For the card: the .jsonl file of zoo eval with this export's results."""
    out: Path | None = None
    """Folder for the model; it must not exist yet. --to hub needs none."""


def main(argv: list[str]) -> None:
    """Write a run's newest checkpoint, or one size of an elastic model, as a plain checkpoint.

    Examples:
    zoo export runs/mine --out so-far
    zoo export runs/elastic --size small --out llama-small
    zoo export runs/mine --to onnx --out mine-onnx --results results.jsonl
    zoo export runs/mine --to hub --repo me/mine
    """
    args = parse(Export, argv, "export", main.__doc__ or "")
    if args.out is not None and args.out.exists():
        raise ValueError(f"{args.out} is there already; choose another --out.")
    if args.to is not None:
        _write_form(args)
        return
    if args.out is None:
        raise ValueError("Give --out, the folder for the model.")
    if args.size == "full" and is_distillation(args.run):
        from zoo.commands.export.checkpoint import export_checkpoint

        export_checkpoint(args.run, args.form, args.out, best=args.best)
        return
    if args.size == "full" and kind_of(args.run) == "distill_text":
        from zoo.commands.export.text import export_text

        export_text(args.run, args.form, args.out, best=args.best)
        return
    if args.best:
        raise ValueError(f"--best is for a run of zoo distill; {args.run} is none.")
    from zoo.commands.export.run import export

    export(args.run, args.size, args.out)


def _write_form(args: Export) -> None:
    """Write a form of the export in a run's folder, or of an export's own folder."""
    from zoo.commands.export.forms import write_form
    from zoo.eval.results import read

    inside = args.run / "export"
    folder = inside if inside.is_dir() else args.run
    records = []
    if args.results is not None:
        own = {str(args.run), str(folder), str(args.run / "export")}
        records = [r for r in read(args.results) if r.target in own]
        if not records:
            raise ValueError(f"{args.results} holds no result of {args.run}.")
    print(write_form(folder, str(args.to), args.out, repo=args.repo, records=records))


def is_distillation(run: Path) -> bool:
    """Tell whether a folder is one of a distillation of images, of a model with one size."""
    return not (run / "export" / "elastic.json").is_file() and kind_of(run) == "distill"


def kind_of(run: Path) -> str:
    """Return the task of a run; "" for another folder."""
    config = run / "config.json"
    return read_json(config).get("kind", "") if config.is_file() else ""
