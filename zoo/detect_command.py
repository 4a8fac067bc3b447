"""`zoo detect` on the command line."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from zoo.commands.detect import Detect, print_plan, read_config, tiny, train_detector
from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class Args:
    run: Annotated[Detect, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Go on with the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (data, detector, speed of a step) and exit."""
    tiny: bool = False
    """Shrink the run to a laptop: 96 px, narrow heads, twenty steps. Other options still count."""


def detect(args: list[str]) -> None:
    """Train a detector over a backbone: a registered model, or an exported student.

    Examples:
    zoo detect fastervit_0 --data COCO_FOLDER --out runs/mask_rcnn
    zoo detect runs/mine --data COCO_FOLDER --detector rt_detr_v2 --steps 5000
    zoo detect eradio_nano --tiny --out runs/shapes      (draws its own data)

    Detectors: mask_rcnn, faster_rcnn, retinanet (torchvision); detr, rt_detr_v2, mask2former
    (transformers). A plain ViT gets ViTDet's pyramid for the first three. The folder has
    annotations/instances_train.json, instances_val.json, train/ and val/, or COCO's own names.
    Afterwards `zoo eval RUN --on detect --data COCO_FOLDER` measures it on another folder.
    """
    if "--resume" in args[:-1]:
        start = read_config(Path(args[args.index("--resume") + 1]))
    else:
        start = tiny(Detect()) if "--tiny" in args else Detect()
    if args and not args[0].startswith("-"):
        start, args = replace(start, backbone=args[0]), args[1:]
    asked = parse(
        Args, args, "detect", detect.__doc__ or "", default=Args(run=start),
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    if asked.dry_run:
        print_plan(asked.run)
        return
    train_detector(asked.run, resume=asked.resume is not None)
    out = asked.run.out
    print(f"detector     {out / 'detector'}\npredictions  {out / 'predictions.json'}")
    print(f"pictures     {out / 'pictures'}")
