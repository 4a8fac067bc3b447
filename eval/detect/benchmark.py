"""The benchmark `detect`: score a trained detector, or train one on a backbone first."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from zoo.eval.detect.coco import CocoImage, CocoSplit, open_coco
from zoo.eval.detect.coco_metric import Prediction, coco_results, coco_scores, write_results
from zoo.eval.detect.config import DetectSettings
from zoo.eval.detect.detector import is_detector, load_detector, read_spec
from zoo.eval.detect.draw import drawn_parts, side_by_side, truth_of
from zoo.eval.detect.finding import find_objects, fitting
from zoo.eval.detect.spec import Detector
from zoo.eval.detect.training import start, train_detector
from zoo.eval.examples import Example, chosen
from zoo.eval.extremes import Extremes
from zoo.eval.registry import Found, Picture, Subject
from zoo.eval.results import TRAINED
from zoo.eval.work import work_folder
from zoo.files import read_json
from zoo.train.run import Run


def detect(subject: Subject, data: Path, settings: DetectSettings) -> Iterator[Found]:
    """Yield COCO's numbers on the validation part in per cent, and pictures of predictions.

    Raises:
        ValueError: the data or the backbone cannot be used; raised before any training.
        Interrupted: a signal came while a detector was trained.
    """
    trained = is_detector(Path(subject.name))
    if trained:
        detector = load_detector(trained, device=subject.device)
        if subject.precision == "amp":
            detector.precision = torch.bfloat16
        agnostic = settings.class_agnostic or detector.spec.class_agnostic
        val = open_coco(data, "val", class_agnostic=agnostic)
    else:
        val = open_coco(data, "val", class_agnostic=settings.class_agnostic)
        val.require_objects()
        with work_folder(subject.work) as work:
            detector = _train(subject, data, val, settings, work)
    yield from measure(
        detector,
        val,
        subject.device,
        pictures=settings.pictures,
        out=settings.predictions,
        unreadable=subject.unreadable,
    )


OWN = ("pictures", "predictions", "class_agnostic")
"""The settings that a trained detector can be measured with; the others are its own."""


def used(
    subject: Subject, data: Sequence[Path], settings: DetectSettings
) -> DetectSettings | dict[str, Any]:
    """Return the settings as they are used: of a trained detector its own.

    Raises:
        ValueError: a setting is given that a trained detector ignores.
    """
    trained = is_detector(Path(subject.name))
    if trained is None:
        return settings
    default = DetectSettings()
    given = {f.name: getattr(settings, f.name) for f in fields(settings)}
    ignored = [n for n, x in given.items() if n not in OWN and x != getattr(default, n)]
    if ignored:
        raise ValueError(
            f"{subject.name} is a trained detector and is measured as it is: leave out "
            f"{', '.join(f'--detect.{name}' for name in ignored)}. It takes "
            f"{', '.join(f'--detect.{name}'.replace('_', '-') for name in OWN)}."
        )
    spec = read_spec(trained / "config.json")
    run = trained.parent / "config.json"
    about = read_json(run, dict[str, Any]) if run.is_file() and trained.name == "detector" else {}
    names = ("steps", "batch", "seed", "optim", "precision", "norms", "backbone_lr", "data")
    own: dict[str, Any] = dict(
        detector=spec.kind, size=spec.size, width=spec.width, score=spec.score
    )
    own["training"] = {name: about[name] for name in names if name in about} or None
    recorded = {name: given[name] for name in OWN} | {TRAINED: own}
    recorded["class_agnostic"] = settings.class_agnostic or spec.class_agnostic
    return recorded


def _train(
    subject: Subject, data: Path, val: CocoSplit, settings: DetectSettings, work: Path
) -> Detector:
    config = settings.run_of(
        backbone=subject.name,
        data=str(data),
        out=work,
        seed=subject.seed,
        device=subject.device.type,
    )
    train = open_coco(data, "train", class_agnostic=config.class_agnostic)
    train.require_objects()
    val.with_classes(train.classes)
    for split in (train, val) if config.has_masks else ():
        split.require_masks()
    run = Run.begin(config)
    detector = train_detector(start(config, train.classes, run), config, train, run)
    subject.unreadable.update(train.unreadable, run.skipped())
    return detector


def measure(
    detector: Detector,
    split: CocoSplit,
    device: torch.device,
    *,
    pictures: int = 0,
    out: Path | None = None,
    unreadable: set[str] | None = None,
) -> Iterator[Found]:
    """Detect the objects of a split; yield pictures, then COCO's numbers in per cent.

    A detector with classes may be measured on a split that is class-agnostic: all its boxes are
    then of one class, and of several on one object all but one are wrong.

    Args:
        pictures: Number of images that are drawn with their predictions, half of them the worst
            by `f1` and half the best.
        out: File for the predictions, in COCO's format.
        unreadable: Takes the names of the images that are in no number, as they cannot be read.

    Raises:
        ValueError: the split's classes are not the detector's, or no image can be read.
    """
    unreadable = set() if unreadable is None else unreadable
    unreadable.update(split.unreadable)
    agnostic = split.class_agnostic and not detector.spec.class_agnostic
    split = split if agnostic else fitting(detector, split)
    masks = detector.spec.has_masks
    if masks:
        split.require_masks()
    results: list[dict[str, Any]] = []
    images: list[CocoImage] = []
    shared = {split.images[i].path for i in chosen(len(split.images))}
    shown = Extremes(pictures, "F1 of boxes (score from 0.5, IoU from 0.5, class)")
    pairs = find_objects(detector, split, device=device, unreadable=unreadable)
    for image, found in pairs:
        images.append(image)
        if agnostic:
            found = found._replace(labels=torch.zeros_like(found.labels))
        results += coco_results(found, image, split)
        if pictures:

            def draw(image=image, found=found) -> Picture:
                drawn = np.asarray(side_by_side(image, found, split))
                return Picture(drawn, f"{image.path.name}: annotations, predictions")

            right = f1(found, truth_of(image, split, masks=False))
            shown.offer(100 * right, f"detect/{image.path.stem}", draw)
            if image.path in shared:
                score = "" if math.isnan(right) else f"F1 {100 * right:.0f} %"
                one = Example(image.path.name, *drawn_parts(image, found, split), score)
                yield "detect/example", one
    yield from shown.found()
    if out is not None:
        write_results(results, out)
    split = replace(split, images=tuple(images))
    for name, value in coco_scores(split, results, masks=masks):
        yield f"detect/{name}", value


def f1(found: Prediction, truth: Prediction, *, score: float = 0.5, iou: float = 0.5) -> float:
    """Return 2 · right / (predicted + objects) of one image, by which pictures are chosen.

    Predictions take, the best first, the object of their class that they overlap most and that is
    not taken. NaN without objects and predictions.
    """
    kept = (found.scores >= score).nonzero()[:, 0].cpu()
    boxes, labels = found.boxes.cpu()[kept], found.labels.cpu()[kept]
    if not len(kept) + len(truth.boxes):
        return math.nan
    overlap = box_iou(boxes.float(), truth.boxes.float())
    overlap[labels[:, None] != truth.labels[None]] = 0
    right = 0
    for row in range(len(kept) if len(truth.boxes) else 0):
        best = int(overlap[row].argmax())
        if overlap[row, best] >= iou:
            right += 1
            overlap[:, best] = 0
    return 2 * right / (len(kept) + len(truth.boxes))
