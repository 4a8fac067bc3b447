"""`zoo distill --image-text`: what its command line says, read without torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from zoo.commands.again import started_again
from zoo.commands.distill.text_args import resumed
from zoo.commands.parse import named_as_field, parse, refuse_other_folder
from zoo.train.distill.image_text_config import DistillImageText
from zoo.train.distill.image_text_stages import STAGES, prealigned, read_stages
from zoo.train.ranges import COUNT, check_ranges

if TYPE_CHECKING:
    from zoo.train.run import Run

OPTION = "--image-text"


@dataclass(frozen=True, kw_only=True)
class DistillImageTextArgs:
    run: Annotated[DistillImageText, tyro.conf.arg(name="")]
    stages: Literal["one", "prealign"] = "one"
    """prealign is Eagle's recipe (2408.15998): each encoder alone, with a projector of its own,
    against the frozen language model; then one projector for all of them; then everything."""
    align_steps: Annotated[int, COUNT] = 500
    """Steps of each stage of one encoder."""
    project_steps: Annotated[int, COUNT] = 500
    """Steps of the stage of the projector; --steps are those of the last stage."""
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (parts, tokens, what is trained, bytes) and exit."""

    def __post_init__(self) -> None:
        check_ranges(self)


def is_image_text(argv: list[str]) -> bool:
    """Tell whether `zoo distill` is asked for a model of images and text."""
    if any(word.partition("=")[0] == OPTION for word in argv):
        return True
    folder = resumed(argv)
    if folder is None:
        return False
    if (folder / STAGES).is_file():
        return True
    if not (folder / "config.json").is_file():
        return False
    from zoo.train.run import Run

    return Run(folder).read_json("config.json").get("kind") == DistillImageText.kind


def main(argv: list[str]) -> None:
    """Train a vision tower, a projector and a language model on questions about images.

    Example:
    zoo distill --image-text vqa --tower vit_small_patch16_224@64 --language llama/random
    --out runs/vqa

    --image-text is called --data below; generated:1000 draws pictures and needs none. What comes
    out, in OUT/export, is transformers' Llava: import zoo.multimodal, and
    LlavaForConditionalGeneration.from_pretrained loads it. The answers on held-out questions are
    measured beside two controls, with shuffled and with grey pictures, and shown in the report.
    """
    args = read_args(argv)
    refuse_other_folder(args.run.out, args.resume)
    if args.stages == "prealign" and not args.resume:
        stages = prealigned(args.run, args.align_steps, args.project_steps)
    else:
        stages = (args.resume and read_stages(args.resume)) or {"": args.run}
    if args.dry_run:
        from zoo.commands.distill.image_text_plan import print_image_text_plan

        print_image_text_plan(args.run, stages)
        return
    from zoo.commands.distill.image_text_stages import run_stages

    resume = args.resume is not None
    if not resume and started_again(None, args.run.out):
        resume, stages = True, read_stages(args.run.out) or {"": args.run}
    print_run(run_stages(stages, args.run.out, resume=resume))


def read_args(argv: list[str]) -> DistillImageTextArgs:
    """Read the changes to the defaults, or to a run that is resumed."""
    argv = named_as_field(argv, OPTION, "--data")
    default = DistillImageTextArgs(run=DistillImageText())
    folder = resumed(argv)
    if folder is not None and (stages := read_stages(folder)):
        last = list(stages.values())[-1]
        default = replace(default, run=replace(last, out=folder))
    elif folder is not None:
        from zoo.train.run import Run

        default = replace(default, run=replace(Run(folder).config(DistillImageText), out=folder))
    about = main.__doc__ or ""
    return parse(DistillImageTextArgs, argv, "distill --image-text", about, default=default)


def print_run(run: "Run") -> None:
    """Print where the model is, and how good beside its controls."""
    about = run.read_json("about.json")
    print(f"model    {run.path / 'export'}  (import zoo.multimodal; LlavaForConditionalGeneration)")
    print(f"report   {run.path / 'report.html'}")
    for name in ("after", "shuffled", "blind"):
        values = {k: v for k, v in about[name].items() if k.endswith("exact")}
        print(f"{name:9}" + "  ".join(f"{key} {value:.1f} %" for key, value in values.items()))
    print(f"question alone  exact {about['question_alone']:.1f} %")
