"""`zoo detect`: what its command line says, read without torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from zoo.commands.again import started_again
from zoo.commands.parse import parse, refuse_other_folder, value_of
from zoo.eval.detect.config import Detect, tiny


@dataclass(frozen=True, kw_only=True)
class DetectArgs:
    run: Annotated[Detect, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the plan (data, detector, speed of a step) and exit."""
    tiny: bool = False
    """Shrink the run to a laptop: 96 px, narrow heads, twenty steps. Other options still count."""


def main(argv: list[str]) -> None:
    """Train a detector over a backbone: a registered model, or an exported student.

    Examples:
    zoo detect fastervit_0 --data COCO_FOLDER --out runs/mask_rcnn
    zoo detect runs/mine --data COCO_FOLDER --detector rt_detr_v2 --steps 5000
    zoo detect eradio_nano --tiny --out runs/shapes      (draws its own data)
    zoo detect --resume runs/mask_rcnn

    Detectors: mask_rcnn, faster_rcnn, retinanet (torchvision); detr, rt_detr_v2, mask2former
    (transformers). A plain ViT gets ViTDet's pyramid for the first three. The folder has
    annotations/instances_train.json, instances_val.json, train/ and val/, or COCO's own names.
    Afterwards `zoo eval RUN --on detect --data COCO_FOLDER` measures it on another folder.
    """
    args = read_args(argv)
    refuse_other_folder(args.run.out, args.resume)
    from zoo.commands.detect import detect, print_plan

    if args.dry_run:
        print_plan(args.run)
        return
    if started_again(args.resume, args.run.out):
        args = read_args(["--resume", str(args.run.out)])
    detect(args.run, resume=args.resume is not None)
    out = args.run.out
    print(f"detector     {out / 'detector'}\npredictions  {out / 'predictions.json'}")
    print(f"pictures     {out / 'pictures'}")


def read_args(argv: list[str]) -> DetectArgs:
    """Read a backbone's name and changes to the fields of a run.

    Raises:
        ValueError: there is no run to resume, or a field has no such value.
    """
    if (folder := value_of(argv, "--resume")) is not None:
        start = read_config(Path(folder))
    else:
        start = tiny(Detect()) if "--tiny" in argv else Detect()
    if argv and not argv[0].startswith("-"):
        start, argv = replace(start, backbone=argv[0]), argv[1:]
    return parse(
        DetectArgs,
        argv,
        "detect",
        main.__doc__ or "",
        default=DetectArgs(run=start),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def read_config(folder: Path) -> Detect:
    """Read what a run was started with.

    Raises:
        ValueError: there is no run of `zoo detect`, or only an earlier version can resume it.
    """
    from zoo.train.run import Run

    run = Run(folder)
    if "training" in (run.read_json("config.json") or ()):
        raise ValueError(
            f"The run in {folder} is of an earlier version, which took the images in another "
            f"order: its detector is read as before (zoo eval {folder} --on detect), but to train "
            "on start a new run with another --out."
        )
    return replace(run.config(Detect), out=folder)
