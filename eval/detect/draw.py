"""Draw predictions on an image: boxes, masks, names and scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from zoo.data.images import read_rgb
from zoo.eval.detect.coco import CocoImage, CocoSplit
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.masks import decode

PALETTE = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000",
    "#808000", "#000075", "#f032e6", "#469990",
)  # fmt: skip
"""Colours by label, so that a class has the same colour in all pictures."""
MOST = 20
Drawn = UInt8[np.ndarray, "H W 3"]


def truth_of(image: CocoImage, split: CocoSplit, *, masks: bool) -> Prediction:
    """Return the annotations of an image as a prediction with scores of 1."""
    objects = split.objects(image)
    boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    labels = torch.tensor([split.label(a) for a in objects], dtype=torch.int64)
    drawn = None
    if masks:
        each = [decode(a.get("segmentation") or [], image.rows, image.cols) for a in objects]
        shape = (0, image.rows, image.cols)
        drawn = torch.from_numpy(np.stack(each) if each else np.zeros(shape)) > 0
    return Prediction(boxes, torch.ones(len(objects)), labels, drawn)


def draw(
    image: UInt8[Tensor, "3 H W"],
    prediction: Prediction,
    classes: Sequence[str],
    *,
    least: float = 0.5,
) -> UInt8[Tensor, "3 H W"]:
    """Draw at most 20 objects, the best first, with scores of at least `least`."""
    kept = (prediction.scores >= least).nonzero()[:MOST, 0].cpu()
    if not len(kept):
        return image
    labels = prediction.labels.cpu()[kept].tolist()
    colours: Any = [PALETTE[label % len(PALETTE)] for label in labels]
    if prediction.masks is not None:
        masks = prediction.masks.cpu()[kept]
        # one by one, the best last: drawn at once, the overlap of two masks would be black
        for mask, colour in reversed(list(zip(masks, colours, strict=True))):
            image = draw_segmentation_masks(image, mask, alpha=0.45, colors=colour)
    scores = prediction.scores.cpu()[kept].tolist()
    names = [
        str(classes[label]) if score == 1 else f"{classes[label]} {score:.2f}"
        for label, score in zip(labels, scores, strict=True)
    ]
    boxes = prediction.boxes.cpu()[kept].round()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    return draw_bounding_boxes(image, boxes, names, colours, width=2)


def side_by_side(image: CocoImage, prediction: Prediction, split: CocoSplit) -> Image.Image:
    """Draw the annotations on the left and the predictions on the right."""
    _, truth, found = drawn_parts(image, prediction, split)
    gap = np.full((image.rows, 8, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([truth, gap, found], axis=1))


def drawn_parts(
    image: CocoImage, prediction: Prediction, split: CocoSplit
) -> tuple[Drawn, Drawn, Drawn]:
    """Return an image, its annotations drawn on it, and the predictions."""
    own = np.array(read_rgb(image.path, upright=False))
    pixels = torch.from_numpy(own).permute(2, 0, 1)
    truth = truth_of(image, split, masks=prediction.masks is not None)
    drawn = (draw(pixels, one, split.classes) for one in (truth, prediction))
    annotated, found = (one.permute(1, 2, 0).numpy() for one in drawn)
    return own, annotated, found
