"""The command line: one sub-command, one short function that calls a part."""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from zoo.commands.parse import parse
from zoo.measure_commands import embed, evaluate, report

if TYPE_CHECKING:
    from zoo.train.config import Distill

USAGE = """zoo: vision backbones, and the distillation of many frozen teachers into one student.

  zoo list [PATTERN]        the models of zoo's own families; `zoo list recipes`: the recipes
  zoo convert SRC NAME OUT  an official checkpoint as safetensors and timm's config
  zoo distill [RECIPE] ...  train a student from teachers, to an export and a report
  zoo eval TARGET ...       measure a run, an export or a model: --on knn,linear,detect,...
  zoo embed DATA OUT ...    features of many images, in shards that kNN and probes read
  zoo report RUN ...        write RUN/report.html again, or join many into one page
  zoo detect BACKBONE ...   train a detector on COCO annotations
  zoo detect-config ...     an mmdet configuration over one of our backbones
  zoo segment-config ...    an mmseg configuration (UPerNet) over one of our backbones
  zoo bench models ...      images/s, memory and multiply-adds beside timm's models
  zoo bench distill ...     a distillation step, part by part, beside the cost model
  zoo experiment phi_s      nine normalisations of three teachers, with paired intervals
  zoo experiment students   one student of each family against its teachers and itself alone

Examples:
  zoo distill                                   the embedded run: no data, no download
  zoo distill --data PATH --teachers timm:vit_small_patch14_dinov2.lvd142m \\
      timm:vit_base_patch16_siglip_224 --student eradio_xxxtiny --size 224 --batch 32 \\
      --steps 1000 --out runs/mine
  zoo distill quickstart --optim.lr 3e-4 --dry-run
  zoo distill am_radio --tiny                   a paper's recipe, small enough for a laptop
  zoo distill --resume runs/mine

Each command explains itself: zoo distill --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; wrong input ends with one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if args[0] == "--version":
        import zoo

        print(zoo.__version__)
        return
    from zoo.train.interrupt import Interrupted

    try:
        _command(args[0])(args[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("ZOO_TRACEBACK"):
            raise
        told = " ".join(str(error).split())
        print(f"zoo: {told} (ZOO_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        print(f"zoo: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        print("zoo: stopped.", file=sys.stderr)
        raise SystemExit(130) from None


def _command(name: str) -> Callable[[list[str]], None]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean zoo {near[0]}?" if near else ""
        raise ValueError(f"There is no command {name!r}; there are {', '.join(COMMANDS)}.{hint}")
    return COMMANDS[name]


@dataclass(frozen=True, kw_only=True)
class ListArgs:
    pattern: tyro.conf.Positional[str] = ""
    """A shell pattern, e.g. "eradio*"; or `recipes`, for what `zoo distill` can run."""


def list_models(args: list[str]) -> None:
    """Show the models of zoo's own families: parameters, input size, weights and licence.

    Examples: zoo list "eradio*"      zoo list recipes
    """
    import timm
    import torch
    from rich.console import Console
    from rich.table import Table

    import zoo

    asked = parse(ListArgs, args, "list", list_models.__doc__ or "")
    if asked.pattern == "recipes":
        return list_recipes()
    names = zoo.list_models(asked.pattern)
    if not names:
        raise ValueError(f"No model matches {asked.pattern!r}; `zoo list` shows all.")
    table = Table()
    for column in ("model", "parameters", "size", "weights", "licence"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for name in names:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        params = sum(p.numel() for p in model.parameters())
        rows, cols = model.pretrained_cfg["input_size"][1:]
        weights: list[Any] = [timm.get_pretrained_cfg(w) for w in timm.list_pretrained(f"{name}.*")]
        table.add_row(
            name,
            f"{params / 1e6:,.2f} M",
            str(cols) if rows == cols else f"{rows}x{cols}",
            "\n".join(w.tag for w in weights) or "-",
            "\n".join(w.license or "-" for w in weights) or "-",
        )
    Console().print(table)
    return None


def list_recipes() -> None:
    """Show the recipes: what each makes, from what, at which size."""
    from rich.console import Console
    from rich.table import Table

    from zoo.train.distill.recipes import RECIPES, summary_of

    table = Table("recipe", "what it does", show_lines=True)
    for column in ("teachers", "student"):
        table.add_column(column, overflow="fold")  # names are for copying
    for name, recipe in RECIPES.items():
        run = recipe()
        sides = ", ".join(str(side) for side in run.sizes or (run.size,))
        teachers = "\n".join(spec.told() for spec in run.teachers) or "yours"
        table.add_row(name, summary_of(recipe), teachers, f"{run.student}\n{sides} px")
    Console().print(table)


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    source: tyro.conf.Positional[Path]
    """A file of weights in any layout that the family reads."""
    name: tyro.conf.Positional[str]
    """The model that it is for, with the tag that it is, e.g. mambavision_t.in1k."""
    out: tyro.conf.Positional[Path]
    """The folder to write."""


def convert(args: list[str]) -> None:
    """Read an official checkpoint and write it as safetensors with timm's config.json.

    Example: zoo convert mambavision_tiny_1k.pth.tar mambavision_t.in1k models/mambavision_t
    """
    from zoo.convert import convert as write

    asked = parse(ConvertArgs, args, "convert", convert.__doc__ or "")
    out = write(asked.source, asked.name, asked.out)
    print(f"{out}  (timm.create_model('local-dir:{out}', pretrained=True))")


def distill(args: list[str]) -> None:
    """Train one student from many frozen teachers.

    Without --data and --teachers this is the embedded run: three teachers are trained on images
    that scikit-learn and scikit-image ship, and distilled into a small E-RADIO.

    Example:
    zoo distill --data PHOTOS --teachers timm:vit_small_patch14_dinov2.lvd142m
    timm:resnet50.a1_in1k,summary=0 --student eradio_xxxtiny --size 224 --out runs/mine

    A teacher is kind:name[/weights][@resolution]; after commas stands how it counts: summary=W and
    spatial=W weigh its losses, rate=R asks it in that share of the steps, follow=1 lets it look at
    the student's size. Kinds are timm, open_clip, hf, zoo, torch (package.function), rule and
    pretext (classifier, autoencoder, gradients: trained on your data).
    """
    from zoo.train.distill.recipes import RECIPES

    config, resume, dry = _distill_args(args, RECIPES)
    if dry:
        from zoo.commands.plan import print_plan

        print_plan(config)
        return
    from zoo.commands.distill import distill
    from zoo.eval.report import build_report

    run = distill(config, resume=resume)
    report = build_report(run.path)
    print(
        f"student  {run.path / 'export'}  (timm.create_model('local-dir:{run.path / 'export'}', "
        f"pretrained=True))\nmetrics  {run.path / 'metrics.jsonl'}\nreport   {report.resolve()}"
    )


def _distill_args(
    args: list[str], recipes: dict[str, Callable[[], "Distill"]]
) -> tuple["Distill", bool, bool]:
    """Read the recipe's name and the overrides of its fields."""
    from zoo.train.config import Distill, TeacherSpec
    from zoo.train.distill.tiny import tiny
    from zoo.train.run import Run

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo):
        if info.type is not TeacherSpec:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="KIND:NAME",
            instance_from_str=lambda words: TeacherSpec.parse(words[0]),
            is_instance=lambda x: isinstance(x, TeacherSpec),
            str_from_instance=lambda spec: [spec.told()],
        )

    @dataclass(frozen=True, kw_only=True)
    class Args:
        run: Annotated[Distill, tyro.conf.arg(name="")]
        resume: Path | None = None
        """Go on with the run in this folder; its own settings are the defaults."""
        dry_run: bool = False
        """Print the plan (models, shapes, bytes, speed) and exit."""
        tiny: bool = False
        """Shrink the recipe to a laptop: small random teachers of the same kinds, embedded
        images, twenty steps. Other options still count."""

    name = None
    if args and not args[0].startswith("-"):
        name, args = args[0], args[1:]
        if name not in recipes:
            near = difflib.get_close_matches(name, recipes, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"There is no recipe {name!r}; there are {', '.join(recipes)}.{hint}")
    if "--resume" in args[:-1]:
        folder = Path(args[args.index("--resume") + 1])
        start = replace(Run(folder).config(), out=folder)
    else:
        own = any(arg.split("=")[0] in ("--data", "--teachers") for arg in args)
        start = recipes[name or ("custom" if own else "quickstart")]()
        start = tiny(start) if "--tiny" in args else start
    about = f"{distill.__doc__}\n{_recipe_lines(recipes)}"
    with registry:
        asked = parse(Args, args, "distill", about, default=Args(run=start))
    return asked.run, asked.resume is not None, asked.dry_run


def _recipe_lines(recipes: dict[str, Callable[[], "Distill"]]) -> str:
    from zoo.train.distill.recipes import summary_of

    lines = (f"  {name}: {summary_of(recipe)}" for name, recipe in recipes.items())
    return "\n".join(["Recipes (zoo distill RECIPE; --tiny shrinks each to a laptop):", *lines])


@dataclass(frozen=True, kw_only=True)
class SpeedArgs:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Registered models, zoo's or timm's, with options if need be (eradio_l,window_size=8), or
    patterns of zoo's own ("eradio*"); mambavision_t, fastervit_0 and three of timm's if none."""
    device: str = "auto"
    """cpu or cuda; cuda where there is one."""
    size: tuple[int, ...] = (224,)
    batch: tuple[int, ...] = (8,)
    modes: str = "eager"
    """Separated by commas: eager, deploy, train, each with +compiled, +autotuned or +graphs, and
    these with +blocks, which compiles block by block."""
    precision: str = "auto"
    """float32, amp (autocast to bfloat16) or bf16 (weights too); amp on cuda, else float32."""
    channels_last: bool = False
    peer: str = "swin_tiny_patch4_window7_224"
    """The model that the others' ratios are to; it is measured too."""
    rounds: int = 20
    threads: int | None = None
    """Of the CPU, for all models; torch's own choice if not given."""
    out: Path | None = None
    """Write this JSON file, a Markdown table and the Pareto plot beside it."""
    compare: Path | None = None
    """Show ratios with this earlier run, a JSON file that --out wrote."""
    profile: bool = False
    """Name each case's five most expensive kernels; on a GPU with their distance from the floor."""


def bench_models(args: list[str]) -> None:
    """Measure images a second, memory and multiply-adds of models beside timm's.

    Example: zoo bench models mambavision_t --device cpu --threads 1 --modes eager,deploy
    --out benchmarks/results/cpu.json
    """
    import itertools

    import torch

    from zoo.commands.bench_models import DEFAULT, expand_names, measure_models
    from zoo.eval.speed.models import Case

    asked = parse(SpeedArgs, args, "bench models", bench_models.__doc__ or "")
    device = _device(asked.device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    names = expand_names([*(asked.names or DEFAULT), asked.peer])
    precision = asked.precision
    if precision == "auto":
        precision = "amp" if device == "cuda" else "float32"
    measure_models(
        [
            Case(
                model=name, size=size, batch=batch, mode=mode, precision=precision,
                channels_last=asked.channels_last, device=device,
            )
            for size, batch, mode, name in itertools.product(
                asked.size, asked.batch, asked.modes.split(","), names
            )
        ],
        rounds=asked.rounds, peer=asked.peer, out=asked.out, compare=asked.compare,
        kernels=5 * asked.profile, command=shlex.join(["zoo", "bench", "models", *args]),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepArgs:
    teachers: tuple[str, ...] = ()
    """As `zoo distill` takes them; CLIP ViT-H/14@378 and DINOv2 ViT-g/14@224 with random weights
    on a GPU, two tiny ViTs elsewhere."""
    student: str | None = None
    size: int | None = None
    batch: int | None = None
    precision: Literal["bf16", "int8", "fp8"] = "bf16"
    """Of the teachers' products."""
    gate: float = 1000.0
    """Least fidelity of teachers in 8 bits; 0 for all layers, whatever they lose."""
    compile: bool | None = None
    """Teachers' blocks and student; on a GPU unless told otherwise."""
    overlap: bool = False
    """Teachers one batch ahead, on a stream of their own."""
    device: str = "auto"
    rounds: int = 10
    out: Path | None = None
    """Write this JSON file."""
    profile: bool = False
    """Name the step's ten most expensive kernels."""


def bench_distill(args: list[str]) -> None:
    """Measure a distillation step and each of its parts alone, beside the cost model.

    Example: zoo bench distill --teachers timm:vit_small_patch14_dinov2/random@224
    --student eradio_xxxtiny --size 224 --batch 32
    """
    from zoo.commands.bench_distill import TINY, TRIO, measure_steps

    asked = parse(StepArgs, args, "bench distill", bench_distill.__doc__ or "")
    device = _device(asked.device)
    on_gpu = device == "cuda"
    given = {name: getattr(asked, name) for name in ("teachers", "student", "size", "batch")}
    step = replace(
        TRIO if on_gpu else TINY,
        **{name: value for name, value in given.items() if value},
        precision=asked.precision, gate=asked.gate, overlap=asked.overlap,
        compiled=on_gpu if asked.compile is None else asked.compile,
    )  # fmt: skip
    measure_steps(
        [step], device=device, rounds=asked.rounds, out=asked.out,
        kernels=10 * asked.profile, command=shlex.join(["zoo", "bench", "distill", *args]),
    )  # fmt: skip


def _device(asked: str) -> str:
    """Resolve `auto`, and refuse a device that is not there."""
    import torch

    has_gpu = torch.cuda.is_available()
    device = ("cuda" if has_gpu else "cpu") if asked == "auto" else asked
    if device not in ("cpu", "cuda") or (device == "cuda" and not has_gpu):
        raise ValueError(f"There is no device {device!r} here; give cpu{', cuda' * has_gpu}.")
    return device


BENCHES: dict[str, Callable[[list[str]], None]] = {
    "models": bench_models,
    "distill": bench_distill,
}


def bench(args: list[str]) -> None:
    """Measure speed; `zoo bench models` says what of."""
    if args and args[0] in BENCHES:
        return BENCHES[args[0]](args[1:])
    if args and args[0] not in ("-h", "--help"):
        raise ValueError(f"zoo bench knows no {args[0]!r}; it measures {', '.join(BENCHES)}.")
    print("\n".join(f"zoo bench {name} --help" for name in BENCHES))
    return None


def _gathered(args: list[str], option: str) -> list[str]:
    """Bring the values of an option that was given several times behind one of it, at the end."""
    rest, values, inside = [], [], False
    for word in args:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            inside = name == option
            if inside and value:
                values.append(value)
        elif inside:
            values.append(word)
            continue
        if not inside:
            rest.append(word)
    return [*rest, option, *values] if values else rest


def experiment(args: list[str]) -> None:
    """Run an experiment that makes its own teachers.

    Example: zoo experiment phi_s --tiny --out runs/phi_s
    """
    from zoo.experiments import EXPERIMENTS

    if not args or args[0] not in EXPERIMENTS:
        if args and args[0] not in ("-h", "--help"):
            known = ", ".join(EXPERIMENTS)
            raise ValueError(f"There is no experiment {args[0]!r}; there are {known}.")
        print("\n".join(f"zoo experiment {name} --help" for name in EXPERIMENTS))
        return
    chosen = EXPERIMENTS[args[0]]()
    start = chosen.tiny() if "--tiny" in args else chosen.full()
    words = _gathered(args[1:], "--data")
    asked = parse(type(start), words, f"experiment {args[0]}", chosen.__doc__ or "", default=start)
    if asked.dry_run:
        chosen.plan(asked)
    elif not chosen.main(asked):
        raise SystemExit(1)


def detect(args: list[str]) -> None:
    """Train a detector over a backbone on a folder with COCO annotations."""
    from zoo.detect_command import detect as run

    run(args)


def detect_config(args: list[str]) -> None:
    """Write an mmdet configuration over an exported student, and say how to train with it.

    Example: zoo detect-config mask-rcnn runs/mine/export COCO_FOLDER detector.py
    """
    from zoo.commands.openmmlab import DetectConfigArgs
    from zoo.commands.openmmlab import detect_config as write

    write(parse(DetectConfigArgs, args, "detect-config", detect_config.__doc__ or ""))


def segment_config(args: list[str]) -> None:
    """Write an mmseg configuration of UPerNet over a student, and say how to train with it.

    Example: zoo segment-config runs/mine/export ADE20K_FOLDER segmenter.py
    """
    from zoo.segment_config import SegmentConfigArgs
    from zoo.segment_config import segment_config as write

    write(parse(SegmentConfigArgs, args, "segment-config", segment_config.__doc__ or ""))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": list_models,
    "convert": convert,
    "distill": distill,
    "eval": evaluate,
    "embed": embed,
    "report": report,
    "detect": detect,
    "detect-config": detect_config,
    "segment-config": segment_config,
    "bench": bench,
    "experiment": experiment,
}
