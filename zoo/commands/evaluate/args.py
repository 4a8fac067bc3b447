"""`zoo eval`: what its command line says, read without torch."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from zoo.commands.parse import parse, value_of, without
from zoo.eval.benchmarks import DEFAULT, find, settings_of
from zoo.eval.protocols import Protocol, departures_of, find_protocols
from zoo.train.config import Device
from zoo.train.ranges import BATCH, PIXELS, SEED, WORKERS, check_ranges


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    target: tyro.conf.Positional[str | None] = None
    """A run's folder, an exported student's folder, or a registered model. Of language models
    lm:FOLDER, a folder, a run, a GGUF file, or a name such as llama_tiny/random. Of models of
    images and text vlm:RUN or vlm:FOLDER."""
    on: str = ""
    """Benchmarks, separated by commas: knn, linear, fewshot, similar, classify, zeroshot,
    retrieval, segment, depth, correspondence, masks, detect, speed; of language models
    perplexity, copying, phonebook, needle, lmeval; of models of images and text vqa, sight,
    prefill. Each has settings of its own: --on knn --help. Without this, a run is compared with
    its teachers, and any other target measured by knn and linear."""
    protocol: str = ""
    """Settings of a paper in place of --on: imagenet-knn, dinov2-linear, radio-ade20k, ... (zoo
    list protocols), with what departs from it. Options still count, as further departures."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Images for every benchmark (perplexity: a text; lmeval: a folder of tasks; vqa: questions
    about images); NAME=PATH for one of them alone. May be given several times."""
    features: Path | None = None
    """A folder of zoo embed, read instead of images."""
    compare: tuple[str, str] | None = None
    """Two models, or two result files (FILE.jsonl or FILE.jsonl:TARGET): differences with paired
    bootstrap intervals over images."""
    size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels; the model's own by default."""
    tokenizer: str = ""
    """Of a language model: bytes, a folder, a repository, or a name; its own by default."""
    batch: Annotated[int, BATCH] = 64
    precision: Literal["float32", "amp"] = "float32"
    """amp is autocast to bfloat16."""
    seed: Annotated[int, SEED] = 0
    workers: Annotated[int, WORKERS] = 0
    """Processes that decode images."""
    device: Device = "auto"
    """auto is a GPU if there is one; under torchrun each process has its own."""
    out: Path | None = None
    """Append each result to this .jsonl file as a line; scores and pictures lie beside it. While
    a benchmark trains (segment, depth, detect), FILE.work beside it holds its checkpoints."""
    resume: bool = False
    """Go on with the same command after it was stopped: results that --out has are not measured
    again, and a training goes on from its last checkpoint. Without this it is refused."""
    track: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that are told each result, as runs have; their files lie beside --out."""
    dry_run: bool = False
    """Print what would be measured, and exit."""
    suite: Path | None = None
    """A TOML file of many evaluations; other options are added to each of them."""
    again: str | None = None
    """Measure again what a line says, FILE.jsonl:NUMBER, and show both results."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Measure a run's student (fidelity, kNN, linear probe), or any model by named benchmarks.

    Examples: zoo eval runs/mine      zoo eval resnet18 --data PHOTOS
    zoo eval runs/mine/export --on knn,fewshot,speed --data PHOTOS --out results.jsonl
    zoo eval lm:FOLDER --on perplexity,needle --data wiki.txt
    zoo eval vlm:runs/vqa --on vqa,sight,prefill --data vqa
    zoo eval --compare results.jsonl:runs/a results.jsonl:runs/b
    zoo eval resnet50.a1_in1k --protocol imagenet-knn --data imagenet
    """
    if (suite := value_of(argv, "--suite")) is not None:
        from zoo.commands.evaluate.suite import run_suite

        run_suite(Path(suite), without(argv, "--suite"), _run)
        return
    _run(argv)


def _run(argv: list[str], *, check: bool = False) -> None:
    """Read words and carry them out, or only check them."""
    protocols = find_protocols(_listed(argv, "--protocol"))
    on = find([*_listed(argv, "--on"), *protocols])
    kinds = {name: settings_of(name) for name in on or DEFAULT}
    defaults = {n: protocols[n].settings if n in protocols else k() for n, k in kinds.items()}
    own: list[Any] = [(name, kind, defaults[name]) for name, kind in kinds.items()]
    args_class = make_dataclass("Args", own, bases=(EvalArgs,), frozen=True, kw_only=True)
    argv = _spelt_out(argv)
    args = parse(args_class, argv, "eval", main.__doc__ or "", several=("--data",))
    if args.again is not None:
        from zoo.commands.evaluate.suite import again

        again(args.again, out=args.out, device=args.device)
        return
    if (args.target is None) == (args.compare is None and args.features is None):
        raise ValueError("Name what to measure: one target, or --compare A B, or --features DIR.")
    from zoo.commands.evaluate.compare import compare_targets, results_of
    from zoo.commands.evaluate.plan import check_plan, show_plan
    from zoo.commands.evaluate.run import evaluate, read_data
    from zoo.commands.evaluate.subject import refuse_ignored
    from zoo.eval.subject import EvalRequest

    on = on or (list(DEFAULT) if args.data or args.features else [])
    stated = [p.size for p in protocols.values() if p.size]
    request = EvalRequest(
        on=tuple(on),
        data=read_data(args.data, on or DEFAULT),
        settings={name: getattr(args, name) for name in kinds},
        protocols=_protocols(args, protocols),
        features=args.features,
        size=args.size or (stated[0] if stated and on == [*protocols] else None),
        tokenizer=args.tokenizer,
        batch=args.batch,
        precision=args.precision,
        seed=args.seed,
        workers=args.workers,
        device=args.device,
        out=args.out,
        resume=args.resume,
        track=args.track,
        command=shlex.join(["zoo", "eval", *argv]),
    )
    measured = [t for t in args.compare or (args.target,) if not (t and results_of(t))]
    for target in filter(None, measured):
        refuse_ignored(target, args.size, argv)
    if check:
        for target in measured:
            check_plan(target, request)
        return
    for text in request.protocols.values():
        print(text)
    if args.dry_run:
        show_plan(measured, request)
    elif args.compare:
        first, second = args.compare
        compare_targets(first, second, request)
    else:
        evaluate(args.target, request)


def _listed(argv: list[str], option: str) -> list[str]:
    return _names(value_of(argv, option) or "")


def _protocols(args: Any, protocols: Mapping[str, Protocol]) -> dict[str, str]:
    """Return for each benchmark the protocol and all departures, as a text."""
    names = _names(args.protocol)
    found = {}
    for (name, protocol), called in zip(protocols.items(), names, strict=True):
        neutral = ("workers", "pictures", "predictions")
        lines = departures_of(protocol, getattr(args, name), args.size, neutral=neutral)
        found[name] = f"{called} ({protocol.source}); departures: {'; '.join(lines) or 'none'}."
    return found


def _names(text: str) -> list[str]:
    return [name for name in text.replace(" ", "").split(",") if name]


def _spelt_out(argv: list[str]) -> list[str]:
    """Let the options of `zoo detect` be those of its training here too: --detect.steps 100."""
    prefix, own, training = "--detect.", settings_of("detect"), "training"
    kind: Any = get_type_hints(own)[training]
    short = {f.name for f in fields(kind)} - {f.name for f in fields(own)}
    found = []
    for word in argv:
        name = word.removeprefix(prefix).partition("=")[0].partition(".")[0].replace("-", "_")
        inner = word.startswith(prefix) and name in short
        found.append(word.replace(prefix, f"{prefix}{training}.", 1) if inner else word)
    return found
