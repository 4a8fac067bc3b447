"""`zoo detect`: train a detector over a backbone, from its config to its predictions."""

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from zoo.commands.parse import parse
from zoo.eval.detect.benchmark import measure, spec_of
from zoo.eval.detect.canvas import Samples
from zoo.eval.detect.coco import CocoSplit, open_coco
from zoo.eval.detect.detector import build_detector, save_detector
from zoo.eval.detect.shapes import write_shapes
from zoo.eval.detect.spec import Detector, Kind, Spec
from zoo.eval.detect.training import Training, TrainState, train_steps
from zoo.eval.registry import Parts, Picture
from zoo.students.build import read_options
from zoo.train.device import tensor_cores
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.progress import Progress
from zoo.train.run import Run

DRAWN = Path("shapes")
"""As `data`: coloured shapes that are drawn into the run's own folder."""


@dataclass(frozen=True, kw_only=True)
class Detect:
    """One detector, trained on one COCO folder."""

    backbone: str = ""
    """A registered model (with its tag for released weights), or the folder of an exported
    student or of its run."""
    data: Path = DRAWN
    """A folder with COCO annotations and images; `shapes` draws some."""
    out: Path = Path("runs/detector")
    detector: Kind = "mask_rcnn"
    size: int = 512
    """Pixels of the longer side of an image, a multiple of 32."""
    width: int = 256
    """Channels of the pyramid and of the heads."""
    class_agnostic: bool = False
    """Learn and measure boxes alone, whatever their class."""
    options: tuple[str, ...] = ()
    """Further keywords for the backbone, key=value."""
    training: Training = field(default_factory=Training)
    device: str = "auto"
    log: int = 10
    """Steps between lines."""
    checkpoint: int = 500
    """Steps between checkpoints."""
    pictures: int = 8
    """Images of the validation part that are drawn with what was found."""

    def __post_init__(self):
        for name in ("log", "checkpoint", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more.")


def tiny(config: Detect) -> Detect:
    """Shrink a run to a laptop: small images, narrow heads, twenty steps."""
    training = replace(config.training, steps=20, batch=2)
    return replace(config, size=96, width=32, training=training, log=5)


def device_of(name: str) -> torch.device:
    """Resolve `auto`, and refuse a device that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here; use --device cpu, or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def checked_spec(config: Detect, classes: tuple[str, ...]) -> Spec:
    """Say what the detector is: all that can be known before it is built.

    Raises:
        ValueError: there is no such backbone, or it suits no detector.
    """
    if not config.backbone:
        raise ValueError("Name a backbone: zoo detect fastervit_0 --data COCO_FOLDER.")
    return spec_of(config, config.backbone, classes, read_options(config.options))


def open_splits(config: Detect, place: Path) -> tuple[CocoSplit, CocoSplit]:
    """Open and check both parts; the second has the first one's classes, by name.

    Args:
        place: Where shapes are drawn, if they are the data.

    Raises:
        ValueError: something is wrong with one of them, or they do not go together.
    """
    folder = config.data
    if folder == DRAWN and not folder.exists():
        folder = place
        if not (folder / "annotations").is_dir():
            write_shapes(folder)
    agnostic = config.class_agnostic
    train, val = (open_coco(folder, part, class_agnostic=agnostic) for part in ("train", "val"))
    for split in (train, val):
        split.require_objects()
        if config.detector in ("mask_rcnn", "mask2former"):
            split.require_masks()
    return train, val.with_classes(train.classes)


def train_detector(config: Detect, *, resume: bool = False) -> dict[str, float]:
    """Train, save, predict, measure and draw; give the numbers.

    Raises:
        ValueError: whatever a user can get wrong, before any work.
        Interrupted: a signal came; the state is saved.
    """
    device = device_of(config.device)
    if not resume:
        Run.refuse_existing(config.out)
    train, val = open_splits(config, config.out / "data")
    spec = checked_spec(config, train.classes)
    torch.manual_seed(config.training.seed)
    trainee = TrainState(build_detector(spec, pretrained=not resume).to(device), config.training)
    config.out.mkdir(parents=True, exist_ok=True)
    run = Run(config.out)
    state = run.load() if resume else None
    if state:
        trainee.load(state)
        run.keep(lambda row: row["step"] <= trainee.step)
    run.write_json("config.json", _as_json(config))
    _train(trainee, train, config, run, device)
    save_detector(trainee.detector, config.out / "detector")
    trainee.detector.precision = torch.float32  # as `zoo eval` measures it
    numbers = _measure(trainee.detector, val, device, config)
    run.write_json("results.json", numbers)
    _print_numbers(numbers, str(config.out))
    return numbers


def _train(
    trainee: TrainState, split: CocoSplit, config: Detect, run: Run, device: torch.device
) -> None:
    settings = config.training
    samples = Samples(
        split, config.size, masks=trainee.detector.spec.has_masks, keep=not settings.workers
    )
    watch = Progress(
        config.detector, total=settings.steps, start=trainee.step, samples=settings.batch
    )
    unread: list[dict[str, torch.Tensor]] = []
    with Interrupt() as interrupt, watch, tensor_cores(device):
        for losses in train_steps(trainee, samples, device=device):
            unread.append(losses)
            step, signum = trainee.step, interrupt.signal
            ends = step == settings.steps
            saves = ends or signum is not None or step % config.checkpoint == 0
            if saves or step % config.log == 0:
                values = _means(unread, step, run)
                run.log("train", step, values)
                run.log_speed(step, *watch.report(step, values))
                unread.clear()
            if saves:
                with watch.paused():
                    run.save(trainee.state())
            if signum is not None and not ends:
                raise Interrupted(
                    signum, f"Stopped after step {step}, which is saved; --resume {run.path}."
                )


def _means(rows: list[dict[str, torch.Tensor]], step: int, run: Run) -> dict[str, float]:
    """Average since the last line; the one place where a step waits for the device."""
    stacked = torch.stack([torch.stack(list(row.values())) for row in rows])
    values = dict(zip(rows[0], stacked.mean(dim=0).tolist(), strict=True))
    if not stacked[:, 0].isfinite().all():
        first = step - len(rows) + int((~stacked[:, 0].isfinite()).nonzero()[0])
        kept = run.checkpoints()
        raise ValueError(
            f"The loss of step {first} is not finite. "
            f"{f'The last good checkpoint is {kept[-1].name}. ' if kept else ''}"
            "Try a lower --lr, or --precision float32."
        )
    return values


def _measure(
    detector: Detector, split: CocoSplit, device: torch.device, config: Detect
) -> dict[str, float]:
    """Return the numbers; write the predictions and the pictures into the run's folder."""
    numbers, place = {}, config.out / "pictures"
    place.mkdir(exist_ok=True)
    found = measure(
        detector, split, device, pictures=config.pictures, out=config.out / "predictions.json"
    )
    for name, value in found:
        if isinstance(value, Picture):
            Image.fromarray(value.pixels).save(place / f"{name.rpartition('/')[2]}.png")
        else:
            numbers[name] = value.value if isinstance(value, Parts) else value
    return numbers


def read_config(folder: Path) -> Detect:
    """Read what a run was started with.

    Raises:
        ValueError: there is no run of `zoo detect`.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text())
        training = Training(**content.pop("training"))
        content["options"] = tuple(content["options"])
        data = Path(content.pop("data"))
        content |= dict(data=data, out=folder, training=training)
        return Detect(**content)
    except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} is no run of `zoo detect`: {error}.") from error


def _as_json(config: Detect) -> dict[str, Any]:
    content = dataclasses.asdict(config)
    content.pop("out")
    return content | dict(data=str(config.data))


def print_plan(config: Detect) -> None:
    """Print what a run would be: data, detector, memory, speed of a step; nothing is written."""
    Run.refuse_existing(config.out)
    device = device_of(config.device)
    with tempfile.TemporaryDirectory() as place:
        train, val = open_splits(config, Path(place))
        spec = checked_spec(config, train.classes)
        trainee = TrainState(build_detector(spec).to(device), config.training)
        samples = Samples(train.first(2 * config.training.batch), config.size, masks=spec.has_masks)
        # two steps of the real loop: there is no better estimate of a detector's speed
        short = TrainState(trainee.detector, replace(config.training, steps=2, workers=0))
        times = [time.perf_counter() for _ in train_steps(short, samples, device=device)]
    seconds = times[1] - times[0]
    parts = (trainee.detector.backbone, trainee.detector)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    table = Table(show_header=False, title=f"{config.detector} over {config.backbone}")
    weights = spec.source.weights or "random"
    table.add_row("backbone", f"{counts[0] / 1e6:,.2f} M parameters, weights {weights}")
    table.add_row("maps", f"strides {', '.join(map(str, spec.source.strides))}")
    table.add_row("detector", f"{counts[1] / 1e6:,.2f} M parameters, canvas {spec.size} px")
    for name, split in (("train", train), ("val", val)):
        objects = sum(len(split.objects(image)) for image in split.images)
        table.add_row(name, f"{len(split)} images, {objects} objects, {len(split.classes)} classes")
    total = seconds * config.training.steps
    table.add_row("speed", f"{seconds:.2g} s a step of {config.training.batch} on {device.type}")
    table.add_row("run", f"{config.training.steps} steps, about {total / 60:.2g} min")
    Console().print(table)
    Console().print("Nothing was written.")


def _print_numbers(numbers: dict[str, float], title: str) -> None:
    table = Table("measure", "value", title=title)
    for name, value in numbers.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Annotated[Detect, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Go on with the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (data, detector, speed of a step) and exit."""
    tiny: bool = False
    """Shrink the run to a laptop: 96 px, narrow heads, twenty steps. Other options still count."""


def main(args: list[str]) -> None:
    """Train a detector over a backbone: a registered model, or an exported student.

    Examples:
    zoo detect fastervit_0 --data COCO_FOLDER --out runs/mask_rcnn
    zoo detect runs/mine --data COCO_FOLDER --detector rt_detr_v2 --steps 5000
    zoo detect eradio_nano --tiny --out runs/shapes      (draws its own data)

    Detectors: mask_rcnn, faster_rcnn, retinanet (torchvision); detr, rt_detr_v2, mask2former
    (transformers). A plain ViT gets ViTDet's pyramid for the first three. The folder has
    annotations/instances_train.json, instances_val.json, train/ and val/, or COCO's own names.
    Afterwards `zoo eval RUN --on detect --data COCO_FOLDER` measures it on another folder.
    """
    if "--resume" in args[:-1]:
        start = read_config(Path(args[args.index("--resume") + 1]))
    else:
        start = tiny(Detect()) if "--tiny" in args else Detect()
    if args and not args[0].startswith("-"):
        start, args = replace(start, backbone=args[0]), args[1:]
    asked = parse(
        Args, args, "detect", main.__doc__ or "", default=Args(run=start),
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    if asked.dry_run:
        print_plan(asked.run)
        return
    train_detector(asked.run, resume=asked.resume is not None)
    out = asked.run.out
    print(f"detector     {out / 'detector'}\npredictions  {out / 'predictions.json'}")
    print(f"pictures     {out / 'pictures'}")
