"""What a benchmark measures: a run's student, an export, a registered model, or stored features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.progress import track

from zoo.data.loader import eval_batches
from zoo.data.sources import Source, open_splits
from zoo.eval.detect.detector import is_detector, load_detector
from zoo.eval.extract import Extracted
from zoo.eval.registry import Split, Subject
from zoo.eval.speed.models import cost
from zoo.eval.speed.throughput import case_name
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import load_export
from zoo.students.student import Student
from zoo.teachers.name import unknown_name


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """An evaluation, described; `check` says what is wrong with it before any work starts."""

    on: tuple[str, ...] = ()
    """Names of benchmarks; none for a run means fidelity and probes on its own held-out images."""
    data: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Where each benchmark's data is."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings of each benchmark; its defaults if not given."""
    features: Path | None = None
    """A folder of `zoo embed`, read instead of images."""
    size: int | None = None
    batch: int = 64
    precision: Literal["float32", "amp"] = "float32"
    seed: int = 0
    workers: int = 0
    out: Path | None = None
    resume: bool = False
    """Go on with what was stopped: the results and the trainings that lie at `out`."""
    command: str | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_run_folder(folder: Path) -> bool:
    """Tell a run from an export or a name."""
    return (folder / "config.json").is_file() and (folder / "export").is_dir()


def open_subject(target: str | None, request: EvalRequest) -> Subject:
    """Build or load the model under test; only its stored features where those are given.

    Raises:
        ValueError: the target is unknown, or there is none.
    """
    shared: dict[str, Any] = dict(
        device=request.device, precision=request.precision, batch=request.batch, seed=request.seed
    )
    if request.features is not None:
        from zoo.eval.stored import about_features, load_features

        about, place = about_features(request.features), request.features

        def stored(_: Path) -> tuple[Extracted, Extracted]:
            return load_features(place)

        return Subject(name=target or about["model"]["target"], made=None, read=stored, **shared)
    if target is None:
        raise ValueError("Name what to measure: a run, an export or a registered model.")
    trained = is_detector(Path(target))
    if trained and set(request.on) != {"detect"}:
        raise ValueError(f"{target} is a trained detector; measure it with --on detect alone.")
    with torch.random.fork_rng(devices=[]):  # weights that are drawn are the same ones again
        torch.manual_seed(request.seed)
        student = detector_backbone(trained) if trained else open_student(target, request.size)
    student = student.to(request.device)

    splits = cache(partial(open_splits, held_out=0.2))  # here: another call may see other files

    def open_part(data: Path, split: Split) -> "_Images":
        return _Images(splits(data)[0 if split == "train" else 1], student, request)

    return Subject(name=target, made=student, open=open_part, **shared)


def open_student(target: str, size: int | None) -> Student:
    """Open an export's folder, a run's, or a registered model; random weights without a tag.

    Raises:
        ValueError: there is no such thing.
    """
    if is_run_folder(Path(target)):
        target = str(Path(target) / "export")
    if Path(target).is_dir():
        return load_export(Path(target))
    if not timm.is_model(target.partition(".")[0]):
        raise unknown_name(target, timm.list_models(), "run, export or registered model")
    if size is None:
        config = timm.get_pretrained_cfg(target)
        size = config.input_size[-1] if config else 224
    return build_student(target, {}, size=size, pretrained="." in target).eval()


def detector_backbone(folder: Path) -> Student:
    """Return the backbone of a trained detector, as a subject has it.

    Its final norm is not a detector's part, and says nothing here.
    """
    detector = load_detector(folder)
    source = detector.spec.source
    options = {k: v for k, v in source.options.items() if k != "img_size"}
    side = source.options.get("img_size", detector.spec.size)
    student = build_student(source.name, {}, size=side, options=options).eval()
    state = {k.removeprefix("model."): v for k, v in detector.backbone.state_dict().items()}
    student.backbone.load_state_dict(state, strict=False)
    return student


class _Images:
    """One part of labelled images, as `Subject.open` gives it."""

    def __init__(self, source: Source, student: Student, request: EvalRequest):
        self.source, self.student, self.request = source, student, request

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        request = self.request
        images = eval_batches(
            self.source, max(self.student.size), request.batch, workers=request.workers,
            pin=request.device.type == "cuda",
        )  # fmt: skip
        total = -(-len(self.source) // request.batch)
        for some in track(images, "extract", total=total, transient=True):
            yield some.to(request.device)


def about_model(student: Student) -> dict[str, Any]:
    """Return the name, the size, the parameters and the multiply-adds of a backbone."""
    try:
        _, macs = cost(case_name(student), student.size[0])
    except (RuntimeError, NotImplementedError):  # an operator that has no meta form
        macs = None
    parameters = sum(p.numel() for p in student.backbone.parameters())
    return dict(name=student.recipe[0], size=student.size[0], parameters=parameters, macs=macs)
