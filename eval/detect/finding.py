"""What a detector finds in a split, and how good that is."""

from collections.abc import Iterator

import torch

from zoo.eval.detect.canvas import Samples, batches
from zoo.eval.detect.coco import CocoImage, CocoSplit
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.spec import Detector


def fitting(detector: Detector, split: CocoSplit) -> CocoSplit:
    """Order a split's classes as the detector's.

    Raises:
        ValueError: they have other names, or one of the two is class-agnostic.
    """
    if detector.spec.class_agnostic != split.class_agnostic:
        which = ("has classes", "is class-agnostic")
        raise ValueError(
            f"The detector {which[detector.spec.class_agnostic]}, {split.file} was opened as if it "
            f"{which[split.class_agnostic]}; open it with class_agnostic="
            f"{detector.spec.class_agnostic}."
        )
    return split.with_classes(detector.spec.classes)


def find_objects(
    detector: Detector,
    split: CocoSplit,
    *,
    device: torch.device,
    batch: int = 8,
    workers: int = 0,
) -> Iterator[tuple[CocoImage, Prediction]]:
    """Yield each image of a split with what the detector finds in it."""
    samples = Samples(split, detector.spec.size, masks=False)
    places = range(len(split))
    order = [[(i, False) for i in places[k : k + batch]] for k in places[::batch]]
    detector.eval()
    for canvas in batches(samples, order, workers=workers):
        found = detector.predict(canvas.to(device))
        for index, prediction in zip(canvas.indices, found, strict=True):
            yield split.images[index], prediction
