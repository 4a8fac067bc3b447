"""A detector, described; what its backbone must give."""

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


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """A backbone: what timm builds it from, and where its first weights are."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    levels: tuple[int, ...]
    """`out_indices` of the maps that are used: of the strides 4 to 32, or a ViT's last."""
    strides: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    getter: bool = True
    weights: str | None = None
    """What `timm.create_model` loads; `None` starts at random."""

    @property
    def plain(self) -> bool:
        """Tell a ViT, whose maps all have one size, from a pyramid."""
        return len(self.strides) == 1

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """Build timm's feature extractor, with the first weights if they are asked for.

        Raises:
            ValueError: timm refuses.
        """
        how: dict[str, Any] = dict(feature_cls="getter") if self.getter else {}
        name = self.weights if pretrained and self.weights else self.name
        try:
            return timm.create_model(
                name, pretrained=pretrained and self.weights is not None, features_only=True,
                out_indices=self.levels, **self.options, **how,
            )  # fmt: skip
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name} cannot be a detector's backbone: {reason}.") from error


@dataclass(frozen=True, kw_only=True)
class DetectorSpec:
    """All that rebuilds a detector, its weights apart."""

    kind: Kind
    source: BackboneSource
    classes: tuple[str, ...]
    size: int = 512
    """Side of the canvas, a multiple of 32; the longer side of an image becomes this."""
    width: int = 256
    """Channels of the pyramid and of the heads; the published detectors have 256."""
    class_agnostic: bool = False
    score: float = 0.05
    """Least score of a box that is given."""

    def __post_init__(self):
        if self.size < GRID or self.size % GRID:
            near = max(GRID, round(self.size / GRID) * GRID)
            raise ValueError(f"size {self.size} is no multiple of {GRID}; the nearest is {near}.")

    @property
    def has_masks(self) -> bool:
        """Tell whether the detector learns and gives masks."""
        return self.kind in ("mask_rcnn", "mask2former")


class Detector(nn.Module):
    """Losses of a batch with its objects, and predictions of a batch.

    Backbone and pyramid run in `precision`; what places boxes stays in float32, since eight bits
    of mantissa do not hold a coordinate to a pixel.
    """

    spec: DetectorSpec
    precision: torch.dtype = torch.float32

    def losses(self, batch: Canvas) -> dict[str, Tensor]:
        """Return the named losses, scalars to be summed."""
        raise NotImplementedError

    def predict(self, batch: Canvas) -> list[Prediction]:
        """Find the objects, in the pixels of the original images, best first."""
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:
        """Return timm's feature extractor."""
        raise NotImplementedError
