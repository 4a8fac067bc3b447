"""torchvision's Mask R-CNN, Faster R-CNN and RetinaNet on any backbone of timm or ours."""

from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from zoo.eval.detect.backbone import SimplePyramid
from zoo.eval.detect.canvas import Canvas, Truth
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.spec import STRIDES, BackboneSource, Detector, DetectorSpec

PUBLISHED_SIDE = 800
"""The side of images, in pixels, for which the published anchors and RoI levels are made."""
LEAST_SHARE = 0.1
"""Smallest factor of the anchors' sizes: they are rounded to pixels, and must keep an area."""


class FeaturePyramid(nn.Module):
    """A backbone's maps, all with `dim` channels: by an FPN, or for a ViT by a simple pyramid.

    `last` adds coarser levels: one by pooling, or RetinaNet's two by convolutions.

    Args:
        dim: Channels of all levels.
        finest: Smallest stride; finer levels of the backbone are not used.
        last: The module that adds the coarser levels.
    """

    def __init__(
        self,
        source: BackboneSource,
        dim: int,
        *,
        finest: int,
        last: ExtraFPNBlock,
        pretrained: bool,
    ):
        super().__init__()
        self.body: Any = source.build(pretrained=pretrained)
        widths = self.body.feature_info.channels()
        self.patch = source.strides[0] if source.plain else None
        strides = STRIDES if source.plain else source.strides
        self.strides = tuple(stride for stride in strides if stride >= finest)
        used = len(self.strides)
        self.neck = (
            SimplePyramid(widths[-1], dim, strides=self.strides)
            if source.plain
            else FeaturePyramidNetwork(widths[-used:], dim)
        )
        self.last = last
        self.out_channels = dim
        self.precision = torch.float32

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> OrderedDict[str, Tensor]:
        low = self.precision != torch.float32
        with torch.autocast(x.device.type, self.precision if low else None, enabled=low):
            maps = self._levels(x)
        maps = [level.float() for level in maps]
        names = [str(i) for i in range(len(maps))]
        maps, names = self.last(maps, maps, names)
        return OrderedDict(zip(names, maps, strict=True))

    def _levels(self, x: Tensor) -> list[Tensor]:
        if self.patch is None:
            used = self.body(x)[-len(self.strides) :]
            named = OrderedDict((str(i), level) for i, level in enumerate(used))
            return list(self.neck(named).values())
        if self.patch != 16:  # a patch of any size covers what 16 pixels show
            size = [side // 16 * self.patch for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", antialias=self.patch < 16)
        return list(self.neck(self.body(x)[-1:]))


class TorchvisionDetector(Detector):
    """A detector of torchvision without its own resizing, since images come on a canvas.

    Below 800 px, anchors and RoI levels shrink with the canvas, as the objects do.

    Raises:
        ValueError: the backbone cannot be built.
    """

    def __init__(self, spec: DetectorSpec, *, pretrained: bool = False):
        super().__init__()
        self.spec = spec
        dense = spec.kind == "retinanet"
        last = LastLevelP6P7(spec.width, spec.width) if dense else LastLevelMaxPool()
        pyramid = FeaturePyramid(
            spec.source, spec.width, finest=8 if dense else 4, last=last, pretrained=pretrained
        )
        share = min(1.0, max(LEAST_SHARE, spec.size / PUBLISHED_SIDE))
        self.model: Any = _MAKE[spec.kind](spec, pyramid, share)
        for name in ("mean", "std"):
            value = torch.tensor(getattr(spec.source, name))
            self.register_buffer(name, value, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone.body

    def losses(self, batch: Canvas) -> dict[str, Tensor]:
        shift = self.spec.kind != "retinanet"  # 0 is the background of the R-CNNs
        targets = [_target(truth, shift) for truth in batch.truths]
        images, maps = self._features(batch)
        if self.spec.kind == "retinanet":
            head = self.model.head(list(maps.values()))
            anchors = self.model.anchor_generator(images, list(maps.values()))
            return self.model.compute_loss(targets, head, anchors)
        proposals, first = self.model.rpn(images, maps, targets)
        _, second = self.model.roi_heads(maps, proposals, images.image_sizes, targets)
        return first | second

    @torch.no_grad()
    def predict(self, batch: Canvas) -> list[Prediction]:
        images, maps = self._features(batch)
        found = self._boxes(images, maps)
        shift = int(self.spec.kind != "retinanet")
        return [
            _prediction(one, size, original, shift)
            for one, size, original in zip(found, batch.sizes, batch.originals, strict=True)
        ]

    def _features(self, batch: Canvas) -> tuple[ImageList, OrderedDict[str, Tensor]]:
        pixels = batch.normalised(self.mean, self.std)
        self.model.backbone.precision = self.precision
        return ImageList(pixels, list(batch.sizes)), self.model.backbone(pixels)

    def _boxes(self, images: ImageList, maps: OrderedDict[str, Tensor]) -> list[dict[str, Tensor]]:
        if self.spec.kind != "retinanet":
            proposals, _ = self.model.rpn(images, maps)
            return self.model.roi_heads(maps, proposals, images.image_sizes)[0]
        levels = list(maps.values())
        head = self.model.head(levels)
        anchors = self.model.anchor_generator(images, levels)
        # the post-processing takes both level by level
        counts = [level.shape[-2] * level.shape[-1] for level in levels]
        each = head["cls_logits"].shape[1] // sum(counts)
        counts = [count * each for count in counts]
        split = {name: list(value.split(counts, dim=1)) for name, value in head.items()}
        anchors = [list(one.split(counts)) for one in anchors]
        return self.model.postprocess_detections(split, anchors, images.image_sizes)


def _target(truth: Truth, shift: bool) -> dict[str, Tensor]:
    target = dict(boxes=truth.boxes, labels=truth.labels + int(shift))
    return target if truth.masks is None else target | dict(masks=truth.masks)


def _prediction(
    found: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int], shift: int
) -> Prediction:
    rows, cols = original
    scale = found["boxes"].new_tensor([cols / size[1], rows / size[0]]).repeat(2)
    boxes = found["boxes"] * scale
    masks = None
    if "masks" in found:
        masks = paste_masks_in_image(found["masks"], boxes, original)[:, 0] > 0.5
    return Prediction(boxes, found["scores"], found["labels"] - shift, masks)


def _anchors(
    pyramid: FeaturePyramid, factor: float, octaves: tuple[float, ...], more: int
) -> AnchorGenerator:
    """Make square, wide and tall anchors of `factor` strides, also for `more` coarser levels."""
    strides = [*pyramid.strides, *(pyramid.strides[-1] * 2**i for i in range(1, more + 1))]
    sizes = tuple(tuple(factor * stride * octave for octave in octaves) for stride in strides)
    return AnchorGenerator(cast(Any, sizes), ((0.5, 1.0, 2.0),) * len(sizes))


def _rois(pyramid: FeaturePyramid, pixels: int, share: float) -> MultiScaleRoIAlign:
    names = [str(i) for i in range(len(pyramid.strides))]
    return MultiScaleRoIAlign(names, pixels, 2, canonical_scale=round(224 * share))


def _rcnn_parts(spec: DetectorSpec, pyramid: FeaturePyramid, share: float) -> dict[str, Any]:
    hidden = 4 * spec.width
    return dict(
        backbone=pyramid,
        num_classes=None,
        rpn_anchor_generator=_anchors(pyramid, 8 * share, (1.0,), 1),
        box_roi_pool=_rois(pyramid, 7, share),
        box_head=TwoMLPHead(49 * spec.width, hidden),
        box_predictor=FastRCNNPredictor(hidden, len(spec.classes) + 1),
        box_score_thresh=spec.score,
    )


def _faster_rcnn(spec: DetectorSpec, pyramid: FeaturePyramid, share: float) -> FasterRCNN:
    return FasterRCNN(**_rcnn_parts(spec, pyramid, share))


def _mask_rcnn(spec: DetectorSpec, pyramid: FeaturePyramid, share: float) -> MaskRCNN:
    width = spec.width
    return MaskRCNN(
        **_rcnn_parts(spec, pyramid, share),
        mask_roi_pool=_rois(pyramid, 14, share),
        mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(width, width, len(spec.classes) + 1),
    )


def _retinanet(spec: DetectorSpec, pyramid: FeaturePyramid, share: float) -> RetinaNet:
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # 1708.02002 section 4
    anchors = _anchors(pyramid, 4 * share, octaves, 2)
    return RetinaNet(pyramid, len(spec.classes), anchor_generator=anchors, score_thresh=spec.score)


_MAKE = {"mask_rcnn": _mask_rcnn, "faster_rcnn": _faster_rcnn, "retinanet": _retinanet}
