"""`zoo distill --text`: what its command line says, read without torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from zoo.commands.again import started_again
from zoo.commands.parse import named_as_field, parse, refuse_other_folder, value_of
from zoo.train.distill.token_config import DistillText

if TYPE_CHECKING:
    from zoo.train.run import Run


DEFAULT, NAME = DistillText(), "distill --text"


@dataclass(frozen=True, kw_only=True)
class DistillTextArgs:
    run: Annotated[DistillText, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (models, what is trained, bytes, speed) and exit."""


def is_text(argv: list[str]) -> bool:
    """Tell whether `zoo distill` is asked for a language model."""
    return any(word.partition("=")[0] == "--text" for word in argv) or _resumes_text(argv)


def _resumes_text(argv: list[str]) -> bool:
    folder = resumed(argv)
    if folder is None or not (folder / "config.json").is_file():
        return False
    from zoo.train.run import Run

    return Run(folder).read_json("config.json").get("kind") == DistillText.kind


def resumed(argv: list[str]) -> Path | None:
    """Return the folder that --resume names."""
    folder = value_of(argv, "--resume")
    return None if folder is None else Path(folder)


def main(argv: list[str]) -> None:
    """Train one language model from frozen ones, token by token.

    Examples:
    zoo distill --text wiki.txt --teachers lm:llama --student lm:llama-pruned --out runs/small
    zoo distill --text wiki.txt --teachers lm:a lm:b,kl=0 --student lm:c --losses.hidden 1 --dry-run
    zoo distill --resume runs/small

    --text, below called --data, is a .txt file, a .jsonl file or a folder of them. The student is a
    folder of transformers' files; what comes out, in OUT/export, is one again. Its loss is the
    divergence of next tokens (--losses.kl); --losses.hidden matches hidden states too, and
    --losses.ce the text itself.
    """
    run_text(argv, DEFAULT, NAME, main.__doc__ or "")


def run_text(argv: list[str], default: DistillText, name: str, about: str) -> None:
    """Carry out a command that trains a language model.

    Args:
        default: What is changed by the words of the command.
        name: Of the command, and what its help says `about` it.
    """
    args = read_args(argv, default, name, about)
    refuse_other_folder(args.run.out, args.resume)
    if args.dry_run:
        from zoo.commands.distill.text_plan import print_text_plan

        print_text_plan(args.run)
        return
    from zoo.commands.distill.text import distill_text

    if started_again(args.resume, args.run.out):
        args = read_args(["--resume", str(args.run.out)], default, name, about)
    print_run(distill_text(args.run, resume=args.resume is not None))


def read_args(
    argv: list[str], default: DistillText = DEFAULT, name: str = NAME, about: str = ""
) -> DistillTextArgs:
    """Read the changes to the defaults, or to a run that is resumed."""
    argv = named_as_field(argv, "--text", "--data")
    start = DistillTextArgs(run=default)
    if folder := resumed(argv):
        from zoo.train.run import Run

        start = DistillTextArgs(run=replace(Run(folder).config(DistillText), out=folder))
    return parse(DistillTextArgs, argv, name, about, default=start)


def print_run(run: "Run") -> None:
    """Print where the student is, and how good."""
    about = run.read_json("about.json")
    print(f"student  {run.path / 'export'}  (AutoModelForCausalLM.from_pretrained)")
    for name in ("before", "after"):
        print(f"{name:8} perplexity {about[name]['perplexity']:.4g}  bpb {about[name]['bpb']:.4f}")
    for sample in about["samples"][:1]:
        print(f"writes   {sample['prompt'][-40:]!r} -> {sample['after'][:60]!r}")
    for label, values in about["teachers"].items():
        print(f"{label:8} perplexity {values['perplexity']:.4g}  bpb {values['bpb']:.4f}")
