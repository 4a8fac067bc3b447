"""The benchmark `detect`: score a trained detector, or train one on a backbone first."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.eval.detect.canvas import Samples
from zoo.eval.detect.coco import CocoSplit, open_coco
from zoo.eval.detect.coco_metric import coco_results, coco_scores, write_results
from zoo.eval.detect.detector import build_detector, find_source, is_detector, load_detector
from zoo.eval.detect.draw import side_by_side
from zoo.eval.detect.finding import find_objects, fitting
from zoo.eval.detect.spec import Detector, DetectorSpec, Kind
from zoo.eval.detect.training import Trainee, Training, train_steps
from zoo.eval.registry import Found, Picture, Subject

TORCHVISION = ("mask_rcnn", "faster_rcnn", "retinanet")


@dataclass(frozen=True, kw_only=True)
class DetectSettings:
    """How a detector is trained on a backbone; a detector of `zoo detect` is measured as it is."""

    detector: Kind = "mask_rcnn"
    size: int = 512
    """Longer side of an image in pixels, a multiple of 32."""
    width: int = 256
    """Channels of the pyramid and of the heads."""
    class_agnostic: bool = False
    """Learn and measure boxes only, whatever their class."""
    training: Training = field(default_factory=Training)
    pictures: int = 8
    """Number of images that are shown with their predictions."""
    predictions: Path | None = None
    """File for the predictions, in COCO's format."""


def detect(subject: Subject, data: Path, settings: DetectSettings) -> Iterator[Found]:
    """Yield COCO's numbers on the validation part in per cent, and pictures of predictions.

    Raises:
        ValueError: the data or the backbone cannot be used; raised before any training.
    """
    trained = is_detector(Path(subject.name))
    if trained:
        detector = load_detector(trained, device=subject.device)
        if subject.precision == "amp":
            detector.precision = torch.bfloat16
        val = open_coco(data, "val", class_agnostic=detector.spec.class_agnostic)
    else:
        val = open_coco(data, "val", class_agnostic=settings.class_agnostic)
        val.require_objects()
        detector = _train(subject, data, val, settings)
    yield from measure(
        detector, val, subject.device, pictures=settings.pictures, out=settings.predictions
    )


def _train(subject: Subject, data: Path, val: CocoSplit, settings: DetectSettings) -> Detector:
    train = open_coco(data, "train", class_agnostic=settings.class_agnostic)
    train.require_objects()
    val.with_classes(train.classes)
    spec = spec_of(settings, subject.name, train.classes)
    for split in (train, val) if spec.has_masks else ():
        split.require_masks()
    torch.manual_seed(subject.seed)
    detector = build_detector(spec, pretrained=True).to(subject.device)
    samples = Samples(train, spec.size, masks=spec.has_masks, keep=not settings.training.workers)
    for _ in train_steps(Trainee(detector, settings.training), samples, device=subject.device):
        pass
    return detector


def spec_of(
    settings: Any, backbone: str, classes: tuple[str, ...], options: dict[str, Any] | None = None
) -> DetectorSpec:
    """Return the description of a detector before it is built.

    Args:
        settings: `DetectSettings`, or another object with its fields.
        options: Keywords of `timm.create_model` for the backbone.

    Raises:
        ValueError: there is no such backbone, or it suits no detector.
    """
    return DetectorSpec(
        kind=settings.detector,
        source=find_source(backbone, settings.size, options=options),
        classes=classes,
        size=settings.size,
        width=settings.width,
        class_agnostic=settings.class_agnostic,
        score=0.05 if settings.detector in TORCHVISION else 0.0,
    )


def measure(
    detector: Detector,
    split: CocoSplit,
    device: torch.device,
    *,
    pictures: int = 0,
    out: Path | None = None,
) -> Iterator[Found]:
    """Detect the objects of a split; yield pictures, then COCO's numbers in per cent.

    Args:
        pictures: Number of images that are drawn with their predictions.
        out: File for the predictions, in COCO's format.

    Raises:
        ValueError: the split's classes are not the detector's.
    """
    split = fitting(detector, split)
    masks = detector.spec.has_masks
    if masks:
        split.require_masks()
    results: list[dict[str, Any]] = []
    for number, (image, found) in enumerate(find_objects(detector, split, device=device)):
        results += coco_results(found, image, split)
        if number < pictures:
            drawn = np.asarray(side_by_side(image, found, split))
            caption = f"{image.path.name}: annotations, predictions"
            yield f"detect/{image.path.stem}", Picture(drawn, caption)
    if out is not None:
        write_results(results, out)
    for name, value in coco_scores(split, results, masks=masks):
        yield f"detect/{name}", value
