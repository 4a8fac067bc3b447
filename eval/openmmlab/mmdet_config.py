"""mmdet's own configurations of four detectors, with another backbone and other data.

The wheel of mmdet ships its configurations. `mmdet_config` reads one and changes what depends on
the backbone, the classes and the images; everything else is as mmdet's authors set it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.eval.detect.backbone import STRIDES, Backbone
from zoo.eval.detect.coco import CocoSplit, open_coco
from zoo.eval.openmmlab.mmcv_ops import supply_ops
from zoo.eval.openmmlab.mmengine_config import (
    backbone_fields,
    build_model,
    finish_config,
    refuse_unreadable,
)

__all__ = ["DETECTORS", "build_detector", "mmdet_config"]

DETECTORS = {
    "mask-rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade-mask-rcnn": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}
"""Files among the wheel's configurations."""

SIZE = (1333, 800)
"""Limit of the longer side, and the shorter side, of the images in all of them, in pixels."""


def mmdet_config(
    detector: str,
    backbone: str | Mapping[str, Any],
    data: str | Path,
    *,
    out: str | Path = "runs/mmdet",
    size: tuple[int, int] = SIZE,
    epochs: int = 12,
    batch: int = 2,
    workers: int = 2,
    lr: float = 1e-4,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Make an `mmengine.Config` that trains and tests a detector on one of our backbones.

    The optimizer is AdamW with a decay of 0.05 on weights only; DINO keeps its own. The rate rises
    over the first 500 steps, or a tenth of a shorter run, and falls where the shipped one falls.

    Args:
        detector: A key of `DETECTORS`.
        backbone: A model's name (with a tag: with its weights); `local-dir:FOLDER` for an exported
            student with its weights; or the arguments of `Backbone`.
        data: A folder with COCO annotations, see `zoo.eval.detect.coco.open_coco`.
        out: Folder of the run's logs and checkpoints.
        size: Limit of the longer side, and the shorter side, to which images are resized, in
            pixels. DINO's several sizes are scaled alike.
        batch: Images per step and GPU.
        overrides: Values by dotted keys of the configuration, set last.

    Raises:
        ValueError: mmdet is not installed, the detector, the backbone or the data cannot be used,
            or the data of a mask detector has no masks.
    """
    if detector not in DETECTORS:
        raise ValueError(f"There is no detector {detector!r}; there are {', '.join(DETECTORS)}.")
    splits = [open_coco(Path(data), name) for name in ("train", "val")]
    config = _shipped(detector)
    masks = "mask" in detector
    _check_splits(splits, masks)
    _set_backbone(config, backbone_fields(backbone))
    _set_classes(config.model, len(splits[0].classes))
    _set_data(config, splits, size=size, batch=batch, workers=workers)
    _set_optimizer(config, lr, own=detector == "dino")
    _set_schedule(config, epochs, len(splits[0]) // batch)
    plugin = "zoo.eval.openmmlab.mmdet_plugin"
    finish_config(config, plugin=plugin, seed=seed, out=out, overrides=overrides)
    return config


def build_detector(config: Any) -> torch.nn.Module:
    """Build the detector of a configuration with new heads, as mmengine's runner does."""
    return build_model(config, "mmdet")


def _shipped(detector: str) -> Any:
    supply_ops()
    import mmdet  # pyright: ignore[reportMissingImports]
    from mmengine.config import Config  # pyright: ignore[reportMissingImports]

    config = Config.fromfile(Path(mmdet.__path__[0]) / ".mim/configs" / DETECTORS[detector])
    for key in ("tta_model", "img_scales"):  # in RetinaNet's file; they have other sizes
        config.pop(key, None)
    return config


def _check_splits(splits: Sequence[CocoSplit], masks: bool) -> None:
    train, val = splits
    if train.classes != val.classes:  # mmdet labels the categories in the order of each file
        raise ValueError(
            f"{train.file} and {val.file} have different categories, or in another order "
            f"({', '.join(train.classes)}; {', '.join(val.classes)}). Give both the same list."
        )
    for split in splits:
        refuse_unreadable(split.unreadable, "mmdet")
        split.require_objects()
        if masks:
            split.require_masks()


def _set_backbone(config: Any, fields: dict[str, Any]) -> None:
    """Set the backbone, fit the neck to it, and normalise images as in its training."""
    model = config.model
    # DINO has no finest level, and RetinaNet's neck skips it: compute only the levels in use.
    wanted = len(model.neck.in_channels) - model.neck.pop("start_level", 0)
    plan = _plan(fields)
    if not plan.is_plain and fields.get("out_indices") is None:
        fields["out_indices"] = plan.out_indices[-wanted:]
        plan = _plan(fields)
    if plan.is_plain:
        _set_pyramid(model, plan, finest=STRIDES[-wanted])
    elif plan.strides != STRIDES[-wanted:]:
        raise ValueError(
            f"{fields['name']} has strides {list(plan.strides)} at out_indices "
            f"{list(plan.out_indices)}; {model.type} needs {list(STRIDES[-wanted:])}."
        )
    else:
        model.neck.in_channels = list(plan.channels)
    model.backbone = dict(type="zoo.Backbone", **fields)
    model.data_preprocessor.mean = [255 * x for x in plan.mean]
    model.data_preprocessor.std = [255 * x for x in plan.std]


def _plan(fields: dict[str, Any]) -> Backbone:
    """Build a backbone on the meta device, without values."""
    untrained: dict[str, Any] = fields | dict(pretrained=False)
    with torch.device("meta"):
        return Backbone(**untrained)


def _set_pyramid(model: Any, plan: Backbone, *, finest: int) -> None:
    """Replace the neck by one that makes the same levels of a plain transformer's one map."""
    if plan.strides != (16,):
        raise ValueError(
            f"A plain transformer must have one map of stride 16 here, not strides "
            f"{list(plan.strides)}: name one block in out_indices, and for other patches build it "
            "with options=dict(patch_size=16)."
        )
    neck = model.neck
    model.neck = dict(
        type="zoo.SimplePyramid",
        in_channels=plan.channels[0],
        out_channels=neck.out_channels,
        strides=[finest * 2**i for i in range(neck.num_outs)],
    )


def _set_classes(part: Any, count: int) -> None:
    """Set `num_classes` wherever it occurs."""
    if isinstance(part, dict):
        if "num_classes" in part:
            part["num_classes"] = count
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for inner in part:
            _set_classes(inner, count)


def _set_data(
    config: Any, splits: Sequence[CocoSplit], *, size: tuple[int, int], batch: int, workers: int
) -> None:
    classes = splits[0].classes
    for split, side in zip(splits, ("train", "val"), strict=True):
        loader = config[f"{side}_dataloader"]
        loader.num_workers, loader.persistent_workers = workers, workers > 0
        dataset = loader.dataset
        dataset.pipeline = [_resized(step, size) for step in dataset.pipeline]
        dataset.update(
            data_root="",
            ann_file=str(split.file.resolve()),
            data_prefix=dict(img=str(split.folder.resolve())),
            metainfo=dict(classes=classes),
        )
        if side == "train":
            loader.batch_size = batch
            # The wheel's files leave out images under 32 pixels a side.
            dataset.filter_cfg = dict(filter_empty_gt=dataset.filter_cfg.filter_empty_gt)
    config.val_evaluator.ann_file = str(splits[1].file.resolve())
    config.test_dataloader = config.val_dataloader
    config.test_evaluator = config.val_evaluator
    # These copies would still name the shipped data.
    for key in ("data_root", "dataset_type", "train_pipeline", "test_pipeline"):
        config.pop(key, None)


def _resized(step: Any, size: tuple[int, int]) -> Any:
    """Return a step of a pipeline for images of another size; DINO's several sizes scale alike."""
    long, short = size[0] / SIZE[0], size[1] / SIZE[1]
    if step.type == "Resize":
        step.scale = tuple(size)
    elif step.type == "RandomChoice":
        step.transforms = [[_resized(s, size) for s in branch] for branch in step.transforms]
    elif step.type == "RandomChoiceResize":  # shorter side, limit of the longer one
        step.scales = [(round(a * short), round(b * long)) for a, b in step.scales]
    elif step.type == "RandomCrop":  # least and greatest side
        step.crop_size = tuple(round(side * short) for side in step.crop_size)
    return step


def _set_optimizer(config: Any, lr: float, *, own: bool) -> None:
    if own:
        config.optim_wrapper.optimizer.lr = lr
        return
    config.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    )


def _set_schedule(config: Any, epochs: int, steps: int) -> None:
    """Stretch the shipped 12 epochs; short runs warm up in a tenth of their steps."""
    config.train_cfg.max_epochs = epochs
    for schedule in config.param_scheduler:
        if schedule.type == "LinearLR":
            # mmengine's linear schedule of one step never rises.
            schedule.end = min(schedule.end, max(2, steps * epochs // 10))
        else:
            schedule.end = epochs
            schedule.milestones = [max(1, round(m * epochs / 12)) for m in schedule.milestones]
