"""Run a detector over a split."""

from collections.abc import Iterator

import torch

from zoo.data.unreadable import Lost, readable
from zoo.eval.detect.canvas import LeftOut, batches
from zoo.eval.detect.coco import CocoImage, CocoSplit
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.spec import Detector


def fitting(detector: Detector, split: CocoSplit) -> CocoSplit:
    """Return the split with its classes in the detector's order.

    Raises:
        ValueError: the two have different classes, or only one of them is class-agnostic.
    """
    if detector.spec.class_agnostic != split.class_agnostic:
        which = ("has classes", "is class-agnostic")
        raise ValueError(
            f"The detector {which[detector.spec.class_agnostic]}, but {split.file} was opened "
            f"as if it {which[split.class_agnostic]}; open it with class_agnostic="
            f"{detector.spec.class_agnostic}."
        )
    return split.with_classes(detector.spec.classes)


def find_objects(
    detector: Detector,
    split: CocoSplit,
    *,
    device: torch.device,
    batch: int = 8,
    unreadable: set[str] | None = None,
) -> Iterator[tuple[CocoImage, Prediction]]:
    """Yield each image of a split with the detector's prediction, in pixels of the image.

    Args:
        unreadable: Takes the names of the images that are left out; see `readable`.
    """
    samples = LeftOut(split, detector.spec.size, masks=False)
    indices = range(len(split))
    order = [[(i, False) for i in indices[k : k + batch]] for k in indices[::batch]]
    detector.eval()

    def predicted() -> Iterator[tuple[CocoImage, Prediction] | Lost]:
        for canvas in batches(samples, order):
            yield from canvas.lost
            found = detector.predict(canvas.to(device)) if len(canvas) else []
            for index, prediction in zip(canvas.indices, found, strict=True):
                yield split.images[index], prediction

    yield from readable(predicted(), unreadable)
