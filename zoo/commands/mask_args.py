"""`zoo mask`: what its command line says, read without torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from zoo.commands.distill_text_args import resumed
from zoo.commands.parse import parse
from zoo.train.distill.mask_config import Mask


@dataclass(frozen=True, kw_only=True)
class MaskArgs:
    model: tyro.conf.Positional[str] = ""
    """lm:FOLDER of transformers' files."""
    run: Annotated[Mask, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (models, what is trained, bytes, speed) and exit."""


def main(argv: list[str]) -> None:
    """Keep N of each M weights of a language model: by one look, or learnt.

    Example:
    zoo mask lm:llama --text wiki.txt --method learned --steps 2000 --out runs/llama24

    What comes out, in OUT/export, is an ordinary folder of transformers whose weights have zeros;
    embeddings and head stay dense. The losses of a learned mask are those of zoo distill --text:
    the text's own by default, a teacher's with --teachers lm:FOLDER --losses.kl 1 --losses.ce 0.
    """
    argv = ["--data" + w[len("--text") :] if w.startswith("--text") else w for w in argv]
    default = MaskArgs(run=Mask())
    if folder := resumed(argv):
        from zoo.train.run import Run

        stored = Run(folder).config(Mask)
        default = MaskArgs(run=replace(stored, out=folder), model=stored.student)
    args = parse(MaskArgs, argv, "mask", main.__doc__ or "", default=default)
    config = replace(args.run, student=args.model)
    if args.dry_run:
        from zoo.commands.plan_text import print_mask_plan

        print_mask_plan(config)
        return
    from zoo.commands.mask import mask

    run = mask(config, resume=args.resume is not None)
    about = run.read_json("about.json")
    print(f"model    {run.path / 'export'}  (AutoModelForCausalLM.from_pretrained)")
    for name, values in about["results"].items():
        print(f"{name:10} perplexity {values['perplexity']:.4g}  bpb {values['bpb']:.4f}")
