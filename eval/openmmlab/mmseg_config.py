"""mmseg's own configuration of UPerNet, with another backbone and other data.

The wheel of mmseg ships its configurations. `mmseg_config` reads one and changes what depends on
the backbone, the classes, the images and the length of the run; everything else is as mmseg's
authors set it.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from zoo.eval.dense.segment_data import SegmentSet, open_segments
from zoo.eval.detect.backbone import Backbone
from zoo.eval.openmmlab.mmcv_ops import supply_ops
from zoo.eval.openmmlab.mmengine_config import (
    backbone_fields,
    build_model,
    finish_config,
    refuse_unreadable,
)

__all__ = ["build_segmenter", "mmseg_config"]

UPERNET = "upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"
"""A file among the wheel's configurations."""

LEVELS = 4
"""Number of maps that UPerNet takes."""

WARMUP = 1500
"""Steps of warm-up in long runs; short ones warm up in a tenth of their steps."""


def mmseg_config(
    backbone: str | Mapping[str, Any],
    data: str | Path,
    *,
    layout: str = "auto",
    out: str | Path = "runs/mmseg",
    crop: tuple[int, int] = (512, 512),
    size: tuple[int, int] = (2048, 512),
    inference: Literal["whole", "slide"] = "whole",
    steps: int = 160_000,
    batch: int = 4,
    workers: int = 4,
    lr: float = 6e-5,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Make an `mmengine.Config` that trains and tests UPerNet (1807.10221) on our backbones.

    The optimizer is AdamW with a decay of 0.01 on weights only. The rate rises over 1,500 steps,
    or a tenth of a shorter run, and falls linearly to zero, as for Swin (2103.14030).

    Args:
        backbone: A model's name (with a tag: with its weights); `local-dir:FOLDER` for an exported
            student with its weights; or the arguments of `Backbone`. Of a plain transformer the
            maps after each quarter of its blocks are used.
        data: A folder of images and masks, see `zoo.eval.dense.segment_data`; no tar files.
        layout: One of `zoo.eval.dense.segment_data.LAYOUTS`, or `auto`.
        out: Folder of the run's logs and checkpoints.
        crop: Rows and columns of the training crops, and of the sliding windows.
        size: Limit of the longer side, and the shorter side, to which images are resized;
            training uses 0.5 to 2 times that.
        inference: `whole` images, or `slide` for windows that overlap by a third.
        batch: Images per step and GPU.
        overrides: Values by dotted keys of the configuration, set last.

    Raises:
        ValueError: mmseg is not installed, or the backbone, the data or a number cannot be used.
    """
    _check_numbers(crop, size, inference, steps, batch)
    unreadable: set[str] = set()
    splits = open_segments(Path(data), layout, unreadable)
    refuse_unreadable(unreadable, "mmseg")
    _check_splits(splits, data)
    plan, fields = _planned(backbone_fields(backbone))
    config = _shipped()
    _set_model(config.model, plan, fields, len(splits[0].classes))
    _set_windows(config.model, crop, inference)
    _set_data(config, splits, Path(data), crop=crop, size=size, batch=batch, workers=workers)
    _set_schedule(config, steps, lr)
    plugin = "zoo.eval.openmmlab.mmseg_plugin"
    finish_config(config, plugin=plugin, seed=seed, out=out, overrides=overrides)
    return config


def build_segmenter(config: Any) -> torch.nn.Module:
    """Build the model of a configuration with a new head, as mmengine's runner does."""
    return build_model(config, "mmseg")


def _check_numbers(
    crop: tuple[int, int], size: tuple[int, int], inference: str, steps: int, batch: int
) -> None:
    if min(*crop, *size, steps) < 1 or size[0] < size[1]:
        raise ValueError(
            f"crop {crop}, size {size} and steps {steps} must be positive, and size the limit of "
            "the longer side, then the shorter side: (2048, 512)."
        )
    if inference not in ("whole", "slide"):
        raise ValueError(f"There is no inference {inference!r}; there are whole, slide.")
    if batch < 2:
        raise ValueError(
            f"batch {batch} is too small: UPerNet pools an image to one cell, and a batch norm "
            "needs two of them. Give 2 or more."
        )


def _check_splits(splits: tuple[SegmentSet, SegmentSet], data: str | Path) -> None:
    train, _ = splits
    if train.layout == "tar":
        raise ValueError(
            f"The images of {data} are in tar files, and mmseg reads them one by one from folders. "
            "Unpack them to images/train, masks/train, images/val and masks/val, or train with "
            "`zoo eval BACKBONE --on segment --segment.head upernet`, which reads tar files."
        )
    if len(train.classes) < 2:
        raise ValueError(
            f"{data} has one class ({', '.join(train.classes)}), so every prediction is right: "
            "name two or more."
        )


def _planned(fields: dict[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """Build a backbone on the meta device, with the four maps that UPerNet takes."""
    plan = _plan(fields)
    if plan.is_plain and fields.get("out_indices") is None:
        blocks = plan.out_indices[-1] + 1
        fields["out_indices"] = [round(blocks * (i + 1) / LEVELS) - 1 for i in range(LEVELS)]
        plan = _plan(fields) if blocks >= LEVELS else plan
    if len(plan.channels) != LEVELS:
        raise ValueError(
            f"{fields['name']} has {len(plan.channels)} maps, at out_indices "
            f"{list(plan.out_indices)}; UPerNet needs {LEVELS}."
        )
    return plan, fields


def _plan(fields: dict[str, Any]) -> Backbone:
    untrained: dict[str, Any] = fields | dict(pretrained=False)
    with torch.device("meta"):
        return Backbone(**untrained)


def _shipped() -> Any:
    if importlib.util.find_spec("mmseg") is None:
        raise ValueError("mmsegmentation is not installed: pip install 'backbone-zoo[seg]'.")
    supply_ops()
    import mmseg  # pyright: ignore[reportMissingImports]
    from mmengine.config import Config  # pyright: ignore[reportMissingImports]

    config = Config.fromfile(Path(mmseg.__path__[0]) / ".mim/configs" / UPERNET)
    # These name other data, or occur inside the model and the loaders as well.
    for key in (
        *("data_root", "dataset_type", "train_pipeline", "tta_pipeline", "tta_model", "img_ratios"),
        *("crop_size", "data_preprocessor", "norm_cfg", "optimizer"),
    ):
        config.pop(key, None)
    return config


def _set_model(model: Any, plan: Backbone, fields: dict[str, Any], classes: int) -> None:
    """Set the backbone, fit the heads to it, and normalise images as in its training."""
    model.pop("pretrained")
    model.backbone = dict(type="zoo.Backbone", **fields)
    if plan.is_plain:  # as for mmseg's ViT and BEiT
        norm = model.decode_head.norm_cfg
        model.neck = dict(type="Feature2Pyramid", embed_dim=plan.channels[0], norm_cfg=norm)
    model.decode_head.in_channels = list(plan.channels)
    model.auxiliary_head.in_channels = plan.channels[model.auxiliary_head.in_index]
    for head in (model.decode_head, model.auxiliary_head):
        head.num_classes = classes
    model.data_preprocessor.mean = [255 * x for x in plan.mean]
    model.data_preprocessor.std = [255 * x for x in plan.std]


def _set_windows(model: Any, crop: tuple[int, int], inference: str) -> None:
    model.data_preprocessor.size = tuple(crop)
    if inference == "slide":
        stride = tuple(max(1, side * 2 // 3) for side in crop)
        model.test_cfg = dict(mode="slide", crop_size=tuple(crop), stride=stride)


def _set_data(
    config: Any,
    splits: tuple[SegmentSet, SegmentSet],
    data: Path,
    *,
    crop: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    workers: int,
) -> None:
    for part, split in zip(splits, ("train", "val"), strict=True):
        loader = config[f"{split}_dataloader"]
        loader.num_workers, loader.persistent_workers = workers, workers > 0
        loader.dataset = dict(
            type="zoo.SegmentFolder",
            path=str(data.resolve()),
            layout=part.layout,
            split=split,
            metainfo=dict(classes=part.classes),
            pipeline=[_fitted(step, crop, size) for step in loader.dataset.pipeline],
        )
    config.train_dataloader.batch_size = batch
    config.test_dataloader = config.val_dataloader
    # for mmseg's inference on images without masks
    steps = config.val_dataloader.dataset.pipeline
    config.test_pipeline = [step for step in steps if step["type"] != "zoo.LoadClasses"]


def _fitted(step: Any, crop: tuple[int, int], size: tuple[int, int]) -> Any:
    """Return a step of a pipeline for our masks and sizes."""
    if step.type == "LoadAnnotations":
        return dict(type="zoo.LoadClasses")
    if step.type == "LoadImageFromFile":
        # Masks have no EXIF orientation.
        step.color_type = "color_ignore_orientation"
    elif step.type in ("RandomResize", "Resize"):
        step.scale = tuple(size)
    elif step.type == "RandomCrop":
        step.crop_size = tuple(crop)
    return step


def _set_schedule(config: Any, steps: int, lr: float) -> None:
    """Set Swin's optimizer and linear schedule; test and save ten times in a run."""
    config.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=lr, weight_decay=0.01),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    )
    rising = min(WARMUP, steps // 10)
    if rising < 2:  # mmengine's linear schedule of one step never rises
        rising = 0
    warmup = dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=rising)
    falling = dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=rising, end=steps)
    config.param_scheduler = [warmup, falling] if rising else [falling]
    config.train_cfg.max_iters = steps
    config.train_cfg.val_interval = max(1, steps // 10)
    config.default_hooks.checkpoint.interval = max(1, steps // 10)
