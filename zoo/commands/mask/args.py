"""`zoo mask`: what its command line says, read without torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from zoo.commands.again import started_again
from zoo.commands.distill.args import teacher_rule
from zoo.commands.distill.text_args import resumed
from zoo.commands.parse import named_as_field, parse
from zoo.train.distill.mask_config import Mask, MaskImages


@dataclass(frozen=True, kw_only=True)
class MaskTextArgs:
    model: tyro.conf.Positional[str] = ""
    """lm:FOLDER of transformers' files."""
    run: Annotated[Mask, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (models, what is trained, bytes, speed) and exit."""


@dataclass(frozen=True, kw_only=True)
class MaskArgs:
    model: tyro.conf.Positional[str] = ""
    """A model of timm or zoo (NAME, NAME/random), a folder of timm, or a run."""
    run: Annotated[MaskImages, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (what is thinned, what is trained) and exit."""


def main(argv: list[str]) -> None:
    """Keep N of each M weights of a vision model, or with --text of a language model.

    By one look at data, or learnt with the weights frozen. All linear layers inside repeated blocks
    are thinned; convolutions, embeddings, heads and classifiers stay dense.

    zoo mask vit_small_patch16_224.augreg_in1k --data PHOTOS --out runs/vit24
    zoo mask lm:llama --text wiki.txt --method learned --steps 2000 --out runs/llama24
    zoo mask --text --help

    What comes out, in OUT/export, is an ordinary checkpoint of timm or transformers whose weights
    have zeros. Masks of a vision model are learnt by the distance to the dense model's features,
    and with --teachers to others' too; those of a language model by the text, or by a teacher:
    --teachers lm:FOLDER --losses.kl 1 --losses.ce 0.
    """
    args = read_args(argv)
    asked = replace(args.run, student=args.model)
    if args.dry_run:
        print_plan(asked)
        return
    if started_again(args.resume, asked.out):
        args = read_args(["--resume", str(asked.out)])
        asked = replace(args.run, student=args.model)
    from zoo.commands.mask.run import mask

    print_results(mask(asked, resume=args.resume is not None))


def read_args(argv: list[str]) -> MaskTextArgs | MaskArgs:
    """Read the changes to the defaults, or to a run that is resumed."""
    kind = MaskTextArgs if is_text(argv) else MaskArgs
    argv = named_as_field(argv, "--text", "--data")
    config: type[Any] = Mask if kind is MaskTextArgs else MaskImages
    default = kind(run=config())
    if folder := resumed(argv):
        from zoo.train.run import Run

        stored = Run(folder).config(config)
        default = kind(run=replace(stored, out=folder), model=stored.student)
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(teacher_rule)
    with registry:
        return parse(kind, argv, "mask", main.__doc__ or "", default=default)


def is_text(argv: list[str]) -> bool:
    """Tell whether `zoo mask` is asked for a language model."""
    if any(word.startswith(("--text", "lm:")) for word in argv):
        return True
    folder = resumed(argv)
    if folder is None or not (folder / "config.json").is_file():
        return False
    from zoo.train.run import Run

    return Run(folder).read_json("config.json").get("kind") == Mask.kind


def print_plan(config: Mask | MaskImages) -> None:
    """Print what would be done."""
    if isinstance(config, Mask):
        from zoo.commands.distill.text_plan import print_mask_plan

        print_mask_plan(config)
    else:
        from zoo.commands.mask.images import print_image_plan

        print_image_plan(config)


def print_results(run: Any) -> None:
    """Print where the model is, and what was measured of it on the way."""
    results = run.read_json("about.json")["results"]
    print(f"model    {run.path / 'export'}")
    for name, values in results.items():
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{name:10} {text}")
