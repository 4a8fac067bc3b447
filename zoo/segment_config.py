"""`zoo segment-config`: an mmseg configuration over one of our backbones, written to a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from zoo.commands.openmmlab import asked_backbone, check_file, write_config
from zoo.students.student import read_pairs


@dataclass(frozen=True, kw_only=True)
class SegmentConfigArgs:
    backbone: tyro.conf.Positional[str]
    """The folder of an exported student, or a registered model (with its tag: with weights)."""
    data: tyro.conf.Positional[Path]
    """A folder of images and masks, as `zoo eval --on segment` takes it; no tar files."""
    config: tyro.conf.Positional[Path]
    """The file to write; it ends in .py."""
    out: Path | None = None
    """The run's folder; beside the file, and named like it, if not given."""
    layout: str = "auto"
    """auto, ade20k, voc, cityscapes, camvid or folder."""
    crop: tuple[int, int] = (512, 512)
    """Rows and columns that are trained on, and of windows that slide."""
    size: tuple[int, int] = (2048, 512)
    """Limit of the longer side and the shorter side of images; training varies them."""
    inference: Literal["whole", "slide"] = "whole"
    """On whole images, or on windows that overlap by a third."""
    steps: int = 160_000
    batch: int = 4
    """Images a step on each GPU."""
    workers: int = 4
    lr: float = 6e-5
    seed: int = 0
    options: tuple[str, ...] = ()
    """Of the backbone, key=value: frozen_stages=2, drop_path_rate=0.3, out_indices=(2,5,8,11)."""
    overrides: tuple[str, ...] = ()
    """Of the configuration, key=value: model.decode_head.channels=256."""


def segment_config(asked: SegmentConfigArgs) -> None:
    """Write the configuration and say what trains, resumes and tests with it.

    Raises:
        ValueError: see `mmseg_config`; or the file's name is none of a configuration.
    """
    from zoo.eval.openmmlab.mmseg_config import mmseg_config

    check_file(asked.config)
    config = mmseg_config(
        asked_backbone(asked.backbone, asked.options),
        asked.data,
        layout=asked.layout,
        out=asked.out or asked.config.with_suffix(""),
        crop=asked.crop,
        size=asked.size,
        inference=asked.inference,
        steps=asked.steps,
        batch=asked.batch,
        workers=asked.workers,
        lr=asked.lr,
        seed=asked.seed,
        overrides=read_pairs(asked.overrides),
    )
    write_config(
        config, asked.config, tool="zoo.eval.openmmlab.mmseg_tool", last=f"iter_{asked.steps}.pth"
    )
