"""DETR, RT-DETRv2 and Mask2Former of transformers on any backbone of timm or ours."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes

from zoo.eval.detect.canvas import Canvas, Truth
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.spec import Detector, DetectorSpec

MOST = 100
"""Most objects that are predicted in an image: as many as COCO's metric reads."""


class TransformersDetector(Detector):
    """A detector of transformers with its own post-processing.

    The model's boxes are relative to the whole canvas, whatever part of it the image covers;
    predictions are in pixels of the original images.

    Raises:
        ValueError: transformers is not installed, or the detector needs more maps than the backbone
            has.
    """

    def __init__(self, spec: DetectorSpec, *, pretrained: bool = False):
        super().__init__()
        try:
            from zoo.detector_backbone import ZooBackbone, ZooBackboneConfig
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{spec.kind} needs transformers: pip install 'backbone-zoo[teachers]'."
            ) from error
        source = spec.source
        least, make, self._process = _KINDS[spec.kind]
        if len(source.levels) < least or (source.plain and source.strides[0] != 16):
            raise ValueError(
                f"{spec.kind} needs {least} maps of strides up to 32 (or of one ViT with patches "
                f"of 16 px, if 1); {source.name} gives strides {source.strides}. Choose "
                "mask_rcnn, which makes a pyramid of a ViT, or another backbone."
            )
        self.spec = spec
        make_config: Any = ZooBackboneConfig  # its fields are known only at run time
        config = make_config(
            backbone=source.name,
            out_indices=list(source.levels[-least:]),
            options=source.options | (dict(feature_cls="getter") if source.getter else {}),
        )
        with torch.device("meta"):
            info: Any = source.build().feature_info
        self.model: Any = make(spec, config, info.channels()[-least:])
        # by name: as a second attribute, the module would have its weights in the state twice
        (self._place,) = [n for n, m in self.model.named_modules() if isinstance(m, ZooBackbone)]
        if pretrained and source.weights:
            self._load_backbone(source.build(pretrained=True))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(source, name)), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def _load_backbone(self, trained: nn.Module) -> None:
        """Copy a backbone's weights; those of levels that are not used are left out."""
        own, state = self._zoo.model.state_dict(), trained.state_dict()
        missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
        assert not missing, missing
        self._zoo.model.load_state_dict({k: v for k, v in state.items() if k in own})

    @property
    def _zoo(self) -> Any:
        return self.model.get_submodule(self._place)

    @property
    def backbone(self) -> nn.Module:
        return self._zoo.model

    def losses(self, batch: Canvas) -> dict[str, Tensor]:
        inputs = self._inputs(batch)
        if self.spec.has_masks:
            objects: dict[str, Any] = dict(
                mask_labels=[_masks(truth, batch) for truth in batch.truths],
                class_labels=[truth.labels for truth in batch.truths],
            )
            return dict(loss=self.model(**inputs, **objects).loss.sum())
        side = batch.images.shape[-1]
        labels = [
            dict(class_labels=t.labels, boxes=box_convert(t.boxes / side, "xyxy", "cxcywh"))
            for t in batch.truths
        ]
        return dict(loss=self.model(**inputs, labels=labels).loss)

    @torch.no_grad()
    def predict(self, batch: Canvas) -> list[Prediction]:
        output = self.model(**self._inputs(batch))
        found = self._process(output, batch.images.shape[-1], self.spec.score)
        return [
            _prediction(one, size, original)
            for one, size, original in zip(found, batch.sizes, batch.originals, strict=True)
        ]

    def _inputs(self, batch: Canvas) -> dict[str, Tensor]:
        self._zoo.precision = self.precision
        return dict(
            pixel_values=batch.normalised(self.mean, self.std), pixel_mask=batch.covered().long()
        )


def _masks(truth: Truth, batch: Canvas) -> Tensor:
    assert truth.masks is not None, "samples of a detector with masks have masks"
    side = batch.images.shape[-1]
    return truth.masks.float().reshape(-1, side, side)


Found = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Scores, labels, and boxes and perhaps masks on the canvas."""


def _prediction(found: Found, size: tuple[int, int], original: tuple[int, int]) -> Prediction:
    scores, labels, boxes, masks = found
    best = scores.argsort(descending=True, stable=True)[:MOST]
    rows, cols = original
    scale = boxes.new_tensor([cols / size[1], rows / size[0]]).repeat(2)
    boxes = clip_boxes_to_image(boxes[best] * scale, original)
    if masks is not None:
        covered = masks[best][:, None, : size[0], : size[1]].float()
        masks = nn.functional.interpolate(covered, original, mode="bilinear")[:, 0] > 0.5
    return Prediction(boxes, scores[best], labels[best], masks)


def _boxes_of(processor: str, **how: Any) -> Callable[[Any, int, float], list[Found]]:
    def process(output: Any, side: int, least: float) -> list[Found]:
        import transformers

        tool = getattr(transformers, processor)()
        sizes = [(side, side)] * len(output.pred_boxes)
        found = tool.post_process_object_detection(
            output, threshold=least, target_sizes=sizes, **how
        )
        return [(one["scores"], one["labels"], one["boxes"], None) for one in found]

    return process


def _masks_of(output: Any, side: int, least: float) -> list[Found]:
    """Return instances with boxes around their masks; instances without a pixel are left out."""
    from transformers import Mask2FormerImageProcessor

    count = len(output.class_queries_logits)
    found = Mask2FormerImageProcessor().post_process_instance_segmentation(
        output, threshold=least, target_sizes=[(side, side)] * count, return_binary_maps=True
    )
    device = output.class_queries_logits.device
    return [_instances(one, side, device) for one in found]


def _instances(found: Any, side: int, device: torch.device) -> Found:
    infos, masks = found["segments_info"], found["segmentation"]
    if not infos:
        masks = torch.zeros(0, side, side)
    masks = masks.to(device) > 0.5
    scores = torch.tensor([float(info["score"]) for info in infos], device=device)
    labels = torch.tensor([info["label_id"] for info in infos], device=device, dtype=torch.int64)
    some = masks.flatten(1).any(dim=1)
    masks, scores, labels = masks[some], scores[some], labels[some]
    boxes = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    return scores, labels, boxes.reshape(-1, 4), masks


def _heads(width: int) -> int:
    """Return the published eight attention heads, or fewer for a narrow model."""
    return next(n for n in (8, 4, 2, 1) if width % n == 0 and width // n >= min(8, width))


def _detr(spec: DetectorSpec, config: Any, channels: list[int]) -> Any:
    from transformers import DetrConfig, DetrForObjectDetection

    layers: dict[str, Any] = dict(encoder_layers=_layers(spec), decoder_layers=_layers(spec))
    return DetrForObjectDetection(DetrConfig(**_shared(spec, config), **_decoder(spec), **layers))


def _rt_detr(spec: DetectorSpec, config: Any, channels: list[int]) -> Any:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    width = spec.width
    # queries start from cells of the three maps, and small canvases have fewer than 300
    cells = sum((spec.size // stride) ** 2 for stride in spec.source.strides[-3:])
    narrow: dict[str, Any] = _decoder(spec) | dict(
        encoder_hidden_dim=width,
        encoder_attention_heads=_heads(width),
        decoder_in_channels=[width] * 3,
        decoder_layers=_layers(spec),
        num_queries=min(300, cells),
    )
    return RTDetrV2ForObjectDetection(
        RTDetrV2Config(
            **_shared(spec, config),
            encoder_in_channels=channels,
            freeze_backbone_batch_norms=False,
            **narrow,
        )
    )


def _mask2former(spec: DetectorSpec, config: Any, channels: list[int]) -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    width = spec.width
    if width % 32:
        raise ValueError(f"mask2former needs a width that is a multiple of 32, not {width}.")
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            **_shared(spec, config),
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            num_attention_heads=_heads(width),
            encoder_layers=_layers(spec),
            decoder_layers=_layers(spec) + 3,
        )
    )


def _shared(spec: DetectorSpec, config: Any) -> dict[str, Any]:
    return dict(backbone_config=config, num_labels=len(spec.classes))


def _layers(spec: DetectorSpec) -> int:
    """Return the published six layers, or two for a model of less than a quarter of its width."""
    return 6 if spec.width >= 64 else 2


def _decoder(spec: DetectorSpec) -> dict[str, Any]:
    heads = _heads(spec.width)
    return dict(
        d_model=spec.width,
        encoder_ffn_dim=4 * spec.width,
        decoder_ffn_dim=4 * spec.width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
    )


_KINDS: dict[str, tuple[int, Callable[[DetectorSpec, Any, list[int]], Any], Any]] = {
    "detr": (1, _detr, _boxes_of("DetrImageProcessor")),
    "rt_detr_v2": (3, _rt_detr, _boxes_of("RTDetrImageProcessor")),
    "mask2former": (4, _mask2former, cast(Any, _masks_of)),
}
"""Number of maps that it needs, the function that builds it, and its post-processing."""
