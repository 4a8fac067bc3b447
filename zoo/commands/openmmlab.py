"""`zoo detect-config`, `zoo segment-config`: mmdet and mmseg configurations over our backbones."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from zoo.commands.parse import parse
from zoo.train.ranges import BATCH, COUNT, PIXELS, POSITIVE, SEED, WORKERS, check_ranges


@dataclass(frozen=True, kw_only=True)
class DetectConfigArgs:
    detector: tyro.conf.Positional[str]
    """mask-rcnn, cascade-mask-rcnn, retinanet or dino."""
    backbone: tyro.conf.Positional[str]
    """The folder of an exported student, or a registered model (with its tag: with weights)."""
    data: tyro.conf.Positional[Path]
    """A folder with COCO annotations: annotations/instances_{train,val}.json, train/ and val/."""
    config: tyro.conf.Positional[Path]
    """The file to write; it ends in .py."""
    out: Path | None = None
    """The run's folder; beside the file, and named like it, if not given."""
    size: Annotated[tuple[int, int], PIXELS] = (1333, 800)
    """Longest and shorter side of the images."""
    epochs: Annotated[int, COUNT] = 12
    batch: Annotated[int, BATCH] = 2
    """Images a step on each GPU."""
    workers: Annotated[int, WORKERS] = 2
    lr: Annotated[float, POSITIVE] = 1e-4
    seed: Annotated[int, SEED] = 0
    options: tuple[str, ...] = ()
    """Of the backbone, key=value: frozen_stages=2, norm_eval=True, img_size=(800,1344), or
    options={"mask_padding":True} for timm.create_model."""
    overrides: tuple[str, ...] = ()
    """Of the configuration, key=value: model.test_cfg.rcnn.score_thr=0.01."""

    def __post_init__(self):
        check_ranges(self)


def detect_config(args: DetectConfigArgs) -> None:
    """Write the configuration, and print the commands that train, resume and test with it.

    Raises:
        ValueError: see `mmdet_config`; or the file's name does not end in .py.
    """
    from zoo.eval.openmmlab.mmdet_config import mmdet_config
    from zoo.students.build import read_pairs

    check_file(args.config)
    config = mmdet_config(
        args.detector,
        read_backbone(args.backbone, args.options),
        args.data,
        out=args.out or args.config.with_suffix(""),
        size=args.size,
        epochs=args.epochs,
        batch=args.batch,
        workers=args.workers,
        lr=args.lr,
        seed=args.seed,
        overrides=read_pairs(args.overrides),
    )
    last = f"epoch_{args.epochs}.pth"
    write_config(config, args.config, tool="zoo.eval.openmmlab.mmdet_tool", last=last)


def check_file(config: Path) -> None:
    """Refuse the name of a file that mmengine would not read.

    Raises:
        ValueError: it does not end in .py.
    """
    if config.suffix != ".py":
        raise ValueError(
            f"mmengine reads configurations in Python: give {config} a name that ends in .py."
        )


def read_backbone(name: str, options: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `Backbone` for a model's name or an export's folder."""
    from zoo.eval.openmmlab.mmengine_config import backbone_fields
    from zoo.students.build import read_pairs

    if Path(name).is_dir():
        name = f"local-dir:{Path(name).resolve()}"
    return backbone_fields(name) | read_pairs(options)


def write_config(config: Any, file: Path, *, tool: str, last: str) -> None:
    """Write a configuration, and print the lines of a shell that run the package's own tools.

    Args:
        tool: The module that runs them.
        last: Name of the run's last checkpoint.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    config.dump(file)
    run = ["python", "-m", tool]
    train = [*run, "train", str(file)]
    test = [*run, "test", str(file), str(Path(config.work_dir) / last)]
    for step, words in dict(train=train, resume=[*train, "--resume"], test=test).items():
        print(f"{step:7} {shlex.join(words)}")


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
    crop: Annotated[tuple[int, int], PIXELS] = (512, 512)
    """Rows and columns that are trained on, and of windows that slide."""
    size: Annotated[tuple[int, int], PIXELS] = (2048, 512)
    """Limit of the longer side and the shorter side of images; training varies them."""
    inference: Literal["whole", "slide"] = "whole"
    """On whole images, or on windows that overlap by a third."""
    steps: Annotated[int, COUNT] = 160_000
    batch: Annotated[int, BATCH] = 4
    """Images a step on each GPU."""
    workers: Annotated[int, WORKERS] = 4
    lr: Annotated[float, POSITIVE] = 6e-5
    seed: Annotated[int, SEED] = 0
    options: tuple[str, ...] = ()
    """Of the backbone, key=value: frozen_stages=2, drop_path_rate=0.3, out_indices=(2,5,8,11)."""
    overrides: tuple[str, ...] = ()
    """Of the configuration, key=value: model.decode_head.channels=256."""

    def __post_init__(self):
        check_ranges(self)


def segment_config(args: SegmentConfigArgs) -> None:
    """Write the configuration, and print the commands that train, resume and test with it.

    Raises:
        ValueError: see `mmseg_config`; or the file's name does not end in .py.
    """
    from zoo.eval.openmmlab.mmseg_config import mmseg_config
    from zoo.students.build import read_pairs

    check_file(args.config)
    config = mmseg_config(
        read_backbone(args.backbone, args.options),
        args.data,
        layout=args.layout,
        out=args.out or args.config.with_suffix(""),
        crop=args.crop,
        size=args.size,
        inference=args.inference,
        steps=args.steps,
        batch=args.batch,
        workers=args.workers,
        lr=args.lr,
        seed=args.seed,
        overrides=read_pairs(args.overrides),
    )
    write_config(
        config, args.config, tool="zoo.eval.openmmlab.mmseg_tool", last=f"iter_{args.steps}.pth"
    )


def main_detect_config(argv: list[str]) -> None:
    """Write an mmdet configuration over an exported student, and print how to train with it.

    Example: zoo detect-config mask-rcnn runs/mine/export COCO_FOLDER detector.py
    """
    detect_config(parse(DetectConfigArgs, argv, "detect-config", main_detect_config.__doc__ or ""))


def main_segment_config(argv: list[str]) -> None:
    """Write an mmseg configuration of UPerNet over a student, and print how to train with it.

    Example: zoo segment-config runs/mine/export ADE20K_FOLDER segmenter.py
    """
    segment_config(
        parse(SegmentConfigArgs, argv, "segment-config", main_segment_config.__doc__ or "")
    )
