"""The benchmark `detect`: score a trained detector, or train one on a backbone first."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.eval.detect.coco import CocoImage, CocoSplit, open_coco
from zoo.eval.detect.coco_metric import coco_results, coco_scores, write_results
from zoo.eval.detect.config import DetectSettings
from zoo.eval.detect.detector import is_detector, load_detector
from zoo.eval.detect.draw import side_by_side
from zoo.eval.detect.finding import find_objects, fitting
from zoo.eval.detect.spec import Detector
from zoo.eval.detect.training import start, train_detector
from zoo.eval.registry import Found, Picture, Subject
from zoo.eval.work import work_folder
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
        val = open_coco(data, "val", class_agnostic=detector.spec.class_agnostic)
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

    Args:
        pictures: Number of images that are drawn with their predictions.
        out: File for the predictions, in COCO's format.
        unreadable: Takes the names of the images that are in no number, as they cannot be read.

    Raises:
        ValueError: the split's classes are not the detector's, or no image can be read.
    """
    unreadable = set() if unreadable is None else unreadable
    unreadable.update(split.unreadable)
    split = fitting(detector, split)
    masks = detector.spec.has_masks
    if masks:
        split.require_masks()
    results: list[dict[str, Any]] = []
    images: list[CocoImage] = []
    pairs = find_objects(detector, split, device=device, unreadable=unreadable)
    for number, (image, found) in enumerate(pairs):
        images.append(image)
        results += coco_results(found, image, split)
        if number < pictures:
            drawn = np.asarray(side_by_side(image, found, split))
            caption = f"{image.path.name}: annotations, predictions"
            yield f"detect/{image.path.stem}", Picture(drawn, caption)
    if out is not None:
        write_results(results, out)
    split = replace(split, images=tuple(images))
    for name, value in coco_scores(split, results, masks=masks):
        yield f"detect/{name}", value
