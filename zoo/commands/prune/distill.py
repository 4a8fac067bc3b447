"""`zoo prune --distill`: a child learns from its parent, as by `zoo distill`, in one command.

The folder holds the distilled model; in it `cut` is the child as it was cut, and `run` the run of
`zoo distill` that trained it.
"""

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.commands.distill import args as image_args
from zoo.commands.distill import image_text_args, text_args
from zoo.commands.distill.image_text import distill_image_text
from zoo.commands.distill.image_text_plan import print_image_text_plan
from zoo.commands.distill.plan import print_plan
from zoo.commands.distill.stages import distill_stages
from zoo.commands.distill.text import distill_text
from zoo.commands.distill.text_plan import print_text_plan
from zoo.commands.parse import value_of
from zoo.commands.prune.image_text import takes_both
from zoo.commands.prune.request import Prune
from zoo.commands.prune.write import ABOUT, write_about
from zoo.eval.report.pruned import build_pruned
from zoo.files import read_json
from zoo.students.export import load_export
from zoo.students.prune.library import Parent, Reshaped
from zoo.students.prune.parent import open_parent
from zoo.students.prune.prune import Child
from zoo.students.start import undecided
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.image_text_config import DistillImageText
from zoo.train.distill.token_config import DistillText
from zoo.train.interrupt import Interrupted
from zoo.train.run import Run
from zoo.wheels import TAG

CUT, RUN = "cut", "run"
Distillation = Distill | DistillText | DistillImageText


def plan_distillation(args: Prune, parent: Parent, words: list[str]) -> Distillation:
    """Read the options of `zoo distill`, with the parent as the first teacher.

    Raises:
        ValueError: the parent cannot teach, or an option is wrong.
    """
    out = args.out or Path("pruned")  # of a dry run
    if takes_both(parent):
        return _plan_image_text(args, parent, out, words)
    options = {
        "--steps": args.distill, "--data": args.data, "--out": out / RUN,
        "--device": args.device, "--seed": args.seed,
    }  # fmt: skip
    teacher, is_text = _teacher(args.model, parent)
    if is_text and args.form == "zoo":
        raise ValueError(
            "A language model that is cut with --form zoo cannot be trained by --distill yet."
        )
    if is_text:
        options |= {"--student": f"lm:{out / CUT}", "--length": args.length}
    else:
        options |= {"--student": f"local-dir:{out / CUT}", "--size": image_size(parent)[0]}
    given = [w for key, value in options.items() if value_of(words, key) is None
             for w in (key, str(value))]  # fmt: skip
    if is_text:
        config = text_args.read_args([*given, *words]).run
        return replace(config, teachers=(teacher, *config.teachers))
    (config,) = image_args.read_args([*given, *words]).stages.values()
    return replace(config, teachers=(TeacherSpec.parse(teacher), *config.teachers))


def _plan_image_text(args: Prune, parent: Parent, out: Path, words: list[str]) -> DistillImageText:
    """Read the options of `zoo distill --image-text`, with the parent as the first teacher.

    It teaches the next tokens of answers, and its tower the features of the child's.
    """
    teacher = f"vlm:{parent.folder}"
    options = {
        "--image-text": args.data, "--start": out / CUT, "--out": out / RUN,
        "--steps": args.distill, "--device": args.device, "--seed": args.seed,
        "--losses.kl": 1.0, "--vision": 1.0, "--teachers": teacher,
    }  # fmt: skip
    given = [w for key, value in options.items() if value_of(words, key) is None
             for w in (key, str(value))]  # fmt: skip
    config = image_text_args.read_args([*given, *words]).run
    if teacher in config.teachers:
        return config
    return replace(config, teachers=(teacher, *config.teachers))


def print_training(config: Distillation, child: Child) -> None:
    """Print what the training of a child would be that is written nowhere."""
    if isinstance(config, DistillImageText):
        start = Path(config.teachers[0].removeprefix("vlm:"))
        print_image_text_plan(replace(config, start=start), {})
        return
    if isinstance(config, DistillText):
        print_text_plan(replace(config, student=config.teachers[0]), student=child.built.model)
        return
    if isinstance(child.built, Reshaped):
        print("No plan of the training: it reads a child in zoo's form, which is not written here.")
        return
    options = undecided(child.built.arguments).items()
    words = tuple(f"{key}={value!r}" for key, value in options)
    print_plan(replace(config, student=child.built.name, student_options=words))


def image_size(parent: Parent) -> tuple[int, int]:
    """Return rows and columns of the images that a model of timm was built for, in pixels."""
    from timm.data import resolve_model_data_config

    embed = getattr(parent.model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return size or resolve_model_data_config(parent.model)["input_size"][1:]


def _teacher(name: str, parent: Parent) -> tuple[str, bool]:
    """Return the parent's name as a teacher, and whether it is a language model."""
    kind = type(parent.model).__name__
    if not parent.name and "ForCausalLM" not in kind:
        raise ValueError(
            f"{kind} is no model of timm and no causal language model, which are those that "
            "--distill trains; cut it without."
        )
    if name.endswith("/random"):
        raise ValueError("A parent with random weights has nothing to teach; leave out --distill.")
    if not parent.name:
        return f"lm:{parent.folder}", True
    if parent.folder:
        return f"timm:local-dir:{parent.folder}", False
    base = name.removesuffix(f".{TAG}")
    return f"timm:{name}" if base == name else f"timm:{base}/{TAG}", False


def distil_child(out: Path, config: Distillation, *, resume: bool = False) -> None:
    """Train the child in `out/cut`, and put it into `out`.

    Raises:
        ValueError: something that the config names is wrong; then nothing is left in `out`.
        Interrupted: a signal came; `resume_child` goes on.
    """
    gc.collect()  # the parent and the child of the cut are opened again
    torch.cuda.empty_cache()
    try:
        run = _distilled(config, resume)
    except Interrupted as stop:
        stop.args = (f"{stop} Continue with zoo prune --resume {out}.",)
        raise
    except BaseException:
        if not (out / RUN / "config.json").is_file():
            shutil.rmtree(out)
        raise
    for file in sorted((run.path / "export").iterdir()):
        shutil.copy(file, out)
    trained = dict(steps=config.steps, teachers=list(config.labels))
    write_about(out, read_json(out / CUT / ABOUT) | dict(distilled=trained))
    print(f"model    {out}, trained; as it was cut, in {out / CUT}")
    print(f"report   {build_pruned(out).resolve()}")


def _distilled(config: Distillation, resume: bool) -> Run:
    if isinstance(config, DistillImageText):
        run = distill_image_text(config, resume=resume)
        image_text_args.print_run(run)
    elif isinstance(config, DistillText):
        run = distill_text(config, resume=resume)
        text_args.print_run(run)
    else:
        run = distill_stages({"": config}, resume=resume)
        image_args.print_run(run)
    return run


def train_briefly(config: Distillation, cut: Path, out: Path, steps: int) -> nn.Module:
    """Train the child in the folder `cut` for some steps, in a run in `out`; return the result.

    A run that stopped goes on.
    """
    resume = (out / "config.json").is_file()
    if isinstance(config, DistillImageText):
        run = _distilled(replace(config, start=cut, steps=steps, out=out), resume)
        return open_parent(str(run.path)).model
    prefix = config.student.partition(":")[0]
    config = replace(config, student=f"{prefix}:{cut}", steps=steps, out=out)
    run = _distilled(config, resume)
    if isinstance(config, DistillText):
        return open_parent(str(run.path)).model
    return load_export(run.path / "export").backbone


def resume_child(out: Path) -> None:
    """Go on with a run of `distil_child`.

    Raises:
        ValueError: there is none.
    """
    run = Run(out / RUN)
    kinds: dict[str, Any] = {kind.kind: kind for kind in (Distill, DistillText, DistillImageText)}
    found = (run.read_json("config.json") or {}).get("kind")
    if found not in kinds:
        raise ValueError(f"There is no run of zoo prune --distill in {out}.")
    distil_child(out, replace(run.config(kinds[found]), out=run.path), resume=True)
