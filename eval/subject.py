"""Open what is measured: a run's student, an export, a registered model, or stored features."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import timm
import torch
from rich.progress import track

from zoo.data.images import EncodedImage, UnreadableImage
from zoo.data.loader import eval_batches
from zoo.data.sources import Source, open_labelled, open_whole
from zoo.eval.detect.detector import is_detector, load_backbone
from zoo.eval.registry import Split, Subject
from zoo.eval.speed.cost import known_cost
from zoo.eval.speed.throughput import case_name
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import load_export
from zoo.students.student import Student
from zoo.teachers.name import unknown_name
from zoo.train.config import Device
from zoo.train.device import device_of
from zoo.train.mesh import is_first, share, world
from zoo.train.ranges import BATCH, PIXELS, SEED, WORKERS, check_ranges
from zoo.wheels import without_tag


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What `zoo eval` is asked to measure, on which data and with which settings."""

    on: tuple[str, ...] = ()
    """Names of benchmarks. Empty for a run: fidelity and probes on its own held-out images."""
    data: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """The data of each benchmark, by its name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of each benchmark, by its name; its defaults where there are none."""
    protocols: Mapping[str, str] = field(default_factory=dict)
    """The named protocol of a benchmark with its departures, by the benchmark's name."""
    features: Path | None = None
    """A folder of `zoo embed`, read instead of images."""
    size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels; the model's own by default."""
    batch: Annotated[int, BATCH] = 64
    precision: Literal["float32", "amp"] = "float32"
    seed: Annotated[int, SEED] = 0
    workers: Annotated[int, WORKERS] = 0
    """Processes that decode images."""
    device: Device = "auto"
    """auto is a GPU if there is one, under torchrun this process's own."""
    out: Path | None = None
    """The result file, to which records are appended."""
    tokenizer: str = ""
    """Of a language model: `bytes`, a folder, a name; its own by default."""
    track: tuple[str, ...] = ()
    """Trackers that are told each result: wandb, mlflow, trackio."""
    resume: bool = False
    """Resume the results and the trainings at `out` that were stopped."""
    command: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def place(self) -> torch.device:
        """The device that `device` names.

        Raises:
            ValueError: there is no such.
        """
        return device_of(self.device)


HELD_OUT = 0.2
"""The share of images that is set aside where train and val are not named."""


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder is a run of `zoo distill`, and not an export."""
    return (folder / "config.json").is_file() and (folder / "export").is_dir()


def open_subject(target: str | None, request: EvalRequest) -> Subject:
    """Build or load the model under test, or only its stored features if the request names them.

    Raises:
        ValueError: there is no target, it is unknown, or it is a trained detector and the request
            names another benchmark than `detect`.
    """
    shared: dict[str, Any] = dict(
        device=request.place,
        precision=request.precision,
        batch=request.batch,
        seed=request.seed,
        workers=request.workers,
    )
    if request.features is not None:
        from zoo.eval.stored import about_features, load_features

        folder = request.features
        name = target or about_features(folder)["model"]["target"]
        return Subject(name=name, made=None, read=lambda _: load_features(folder), **shared)
    if target is None:
        raise ValueError("Name what to measure: a run, an export or a registered model.")
    trained = is_detector(Path(target))
    if trained and set(request.on) != {"detect"}:
        raise ValueError(f"{target} is a trained detector; measure it with --on detect alone.")
    with torch.random.fork_rng(devices=[]):  # random weights are the same on each call
        torch.manual_seed(request.seed)
        student = load_backbone(trained) if trained else open_student(target, request.size)
    student = student.to(request.place)

    splits = cache(
        partial(open_labelled, held_out=HELD_OUT)
    )  # per call: the files may have changed
    unreadable: set[str] = set()

    def open_part(data: Path, split: Split) -> "_Images":
        whole = split == "whole"
        source = open_whole(data) if whole else splits(data)[0 if split == "train" else 1]
        return _Images(source, student, request, unreadable)

    return Subject(name=target, made=student, open=open_part, unreadable=unreadable, **shared)


def open_student(target: str, size: int | None) -> Student:
    """Open the folder of an export or of a run, or build a registered model.

    A registered name without a tag gets random weights.

    Args:
        size: Side of the images in pixels, for registered models; their own size by default.

    Raises:
        ValueError: there is no such folder or model.
    """
    if is_run_folder(Path(target)):
        target = str(Path(target) / "export")
    if Path(target).is_dir():
        return load_export(Path(target))
    if not timm.is_model(target.partition(".")[0]):
        raise unknown_name(target, timm.list_models(), "run, export or registered model")
    if size is None:
        config = timm.get_pretrained_cfg(without_tag(target))
        size = config.input_size[-1] if config else 224
    return build_student(target, {}, size=size, pretrained="." in target).eval()


class _Images:
    """The training or the validation part of a folder of images; see `zoo.eval.registry.Images`."""

    def __init__(
        self, source: Source, student: Student, request: EvalRequest, unreadable: set[str]
    ):
        self.source, self.student, self.request = source, student, request
        self.unreadable = unreadable

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def pixels(self, keys: Collection[str]) -> dict[str, np.ndarray]:
        """Read the whole images of these names; one that cannot be read is missing."""
        found = {}
        for index in range(len(self.source)):
            key = self.source.key(index)
            if key in keys:
                try:
                    image = EncodedImage(self.source.read(index), name=key).rgb()
                except UnreadableImage:
                    continue
                found[key] = np.asarray(image)
        return found

    def __iter__(self) -> Iterator[Batch]:
        request = self.request
        images = eval_batches(
            self.source,
            max(self.student.size),
            request.batch,
            workers=request.workers,
            pin=request.place.type == "cuda",
            unreadable=self.unreadable,
            share=share(),
        )
        total = -(-len(self.source) // (request.batch * world()))
        quiet = not is_first()
        for some in track(images, "extract", total=total, transient=True, disable=quiet):
            yield some.to(request.place)


def about_model(student: Student, side: int | None = None) -> dict[str, Any]:
    """Return `name`, `size`, `parameters` and `macs` of a backbone, for a record of results.

    `macs` are the multiply-adds of one image; `None` where they cannot be counted.

    Args:
        side: Side of the image in pixels; the student's own by default.
    """
    side = side or student.size[0]
    found = known_cost(case_name(student), side)
    macs = None if found is None else found[1]
    parameters = sum(p.numel() for p in student.backbone.parameters())
    return dict(name=student.recipe[0], size=side, parameters=parameters, macs=macs)
