"""`zoo detect-config`: an mmdet configuration over one of our backbones, written to a file."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.students.student import read_pairs


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
    size: tuple[int, int] = (1333, 800)
    """Longest and shorter side of the images."""
    epochs: int = 12
    batch: int = 2
    """Images a step on each GPU."""
    workers: int = 2
    lr: float = 1e-4
    seed: int = 0
    options: tuple[str, ...] = ()
    """Of the backbone, key=value: frozen_stages=2, norm_eval=True, img_size=(800,1344), or
    options={"mask_padding":True} for timm.create_model."""
    overrides: tuple[str, ...] = ()
    """Of the configuration, key=value: model.test_cfg.rcnn.score_thr=0.01."""


def detect_config(asked: DetectConfigArgs) -> None:
    """Write the configuration and say what trains, resumes and tests with it.

    Raises:
        ValueError: see `mmdet_config`; or the file's name is none of a configuration.
    """
    from zoo.eval.detect.mmdet_config import mmdet_config

    if asked.config.suffix != ".py":
        raise ValueError(
            f"mmengine reads configurations of Python: {asked.config} ends not in .py."
        )
    name = asked.backbone
    if Path(name).is_dir():
        name = f"local-dir:{Path(name).resolve()}"
    config = mmdet_config(
        asked.detector,
        dict(name=name, pretrained="." in name or ":" in name) | read_pairs(asked.options),
        asked.data,
        out=asked.out or asked.config.with_suffix(""),
        size=asked.size,
        epochs=asked.epochs,
        batch=asked.batch,
        workers=asked.workers,
        lr=asked.lr,
        seed=asked.seed,
        overrides=read_pairs(asked.overrides),
    )
    asked.config.parent.mkdir(parents=True, exist_ok=True)
    config.dump(asked.config)
    for told, line in _commands(asked.config, Path(config.work_dir), asked.epochs).items():
        print(f"{told:7} {line}")


def _commands(config: Path, out: Path, epochs: int) -> dict[str, str]:
    """The lines of a shell that run mmdet's own tools."""
    run = ["python", "-m", "zoo.eval.detect.mmdet_tool"]
    train = [*run, "train", str(config)]
    test = [*run, "test", str(config), str(out / f"epoch_{epochs}.pth")]
    lines = dict(train=train, resume=[*train, "--resume"], test=test)
    return {told: shlex.join(words) for told, words in lines.items()}
