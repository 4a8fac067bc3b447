"""The description of a detector and of its backbone, and the interface of all detectors."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zoo.eval.detect.canvas import GRID, Canvas
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.config import Kind

STRIDES = (4, 8, 16, 32)
"""Strides of the maps that a detector can use."""


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """A backbone: the arguments from which timm builds it, its maps, and its initial weights."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    levels: tuple[int, ...]
    """timm's `out_indices` of the maps that are used: strides 4 to 32, or the last map of a ViT."""
    strides: tuple[int, ...]
    """Strides of these maps."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    getter: bool = True
    """Whether timm extracts the maps by `forward_intermediates`."""
    weights: str | None = None
    """The name by which `timm.create_model` loads the weights; `None` for random ones."""

    @property
    def plain(self) -> bool:
        """Whether it is a ViT, whose maps all have one size."""
        return len(self.strides) == 1

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """Build timm's feature extractor, with its initial weights if `pretrained`.

        Raises:
            ValueError: timm cannot build it.
        """
        how: dict[str, Any] = dict(feature_cls="getter") if self.getter else {}
        name = self.weights if pretrained and self.weights else self.name
        try:
            return timm.create_model(
                name,
                pretrained=pretrained and self.weights is not None,
                features_only=True,
                out_indices=self.levels,
                **self.options,
                **how,
            )
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name} cannot be a detector's backbone: {reason}.") from error


@dataclass(frozen=True, kw_only=True)
class DetectorSpec:
    """Everything from which a detector is rebuilt, except its weights."""

    kind: Kind
    source: BackboneSource
    classes: tuple[str, ...]
    size: int = 512
    """Side of the canvas in pixels, a multiple of 32; an image's longer side is resized to it."""
    width: int = 256
    """Channels of the pyramid and of the heads; the published detectors have 256."""
    class_agnostic: bool = False
    """Treat all classes as one."""
    score: float = 0.05
    """Boxes with a lower score are dropped."""

    def __post_init__(self):
        if self.size < GRID or self.size % GRID:
            near = max(GRID, round(self.size / GRID) * GRID)
            raise ValueError(
                f"size {self.size} is not a multiple of {GRID}; the nearest is {near}."
            )

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.kind in ("mask_rcnn", "mask2former")


class Detector(nn.Module):
    """The interface of a detector: the losses of a batch, and the predictions for a batch.

    Backbone and pyramid run in `precision`. The parts that predict boxes stay in float32, since a
    mantissa of eight bits cannot hold a coordinate to a pixel.
    """

    spec: DetectorSpec
    precision: torch.dtype = torch.float32

    def losses(self, batch: Canvas) -> dict[str, Tensor]:
        """Return the named losses of a batch with its objects; the total loss is their sum."""
        raise NotImplementedError

    def predict(self, batch: Canvas) -> list[Prediction]:
        """Return each image's prediction, in pixels of the original image, best first."""
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:
        """Return timm's feature extractor."""
        raise NotImplementedError
