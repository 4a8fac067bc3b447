"""The configuration of a detector and of its training."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from zoo.train.config import Optim, Precision, Training
from zoo.train.ranges import (
    BATCH,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    WORKERS,
    between,
    check_ranges,
)

Kind = Literal["mask_rcnn", "faster_rcnn", "retinanet", "detr", "rt_detr_v2", "mask2former"]
DRAWN = "shapes"
"""The value of `data` for synthetic images, which are written to the run's folder."""


@dataclass(frozen=True, kw_only=True)
class DetectTraining(Training):
    """How a detector is trained, for any backbone."""

    kind: ClassVar[str] = "detect"
    one_measure: ClassVar[bool] = True

    batch: Annotated[int, BATCH] = 16
    optim: Optim = field(
        default_factory=lambda: Optim(lr=2e-4, min_lr=0.0, weight_decay=0.05, ema=0.0)
    )
    backbone_lr: Annotated[float, POSITIVE] = 1.0
    """Factor of the backbone's rate relative to that of the new parts; see also
    `optim.layer_decay`."""
    precision: Precision = "auto"
    """Of the backbone and the pyramid; auto is bf16 on CUDA and float32 elsewhere. What places
    boxes stays in float32."""
    workers: Annotated[int, WORKERS] = 0
    """Processes that decode; with 0 the images are decoded once and held in memory."""
    norms: Literal["trained", "frozen"] = "trained"
    """`frozen`: batch norms of the backbone keep their statistics, for trained backbones and small
    batches."""

    def __post_init__(self):
        super().__post_init__()
        if self.precision == "float64":
            raise ValueError("A detector's boxes are float32; give precision float32 or bf16.")


@dataclass(frozen=True, kw_only=True)
class DetectorChoice:
    """Which detector is built on a backbone."""

    detector: Kind = "mask_rcnn"
    size: Annotated[int, PIXELS] = 512
    """Longer side of an image in pixels, a multiple of 32."""
    width: Annotated[int, between(1, 65_536)] = 256
    """Channels of the pyramid and of the heads."""
    class_agnostic: bool = False
    """Learn and measure boxes only, whatever their class."""
    pictures: Annotated[int, NOT_NEGATIVE] = 8
    """Number of validation images that are shown with their predictions."""

    def __post_init__(self):
        check_ranges(self)

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.detector in ("mask_rcnn", "mask2former")


@dataclass(frozen=True, kw_only=True)
class Detect(DetectorChoice, DetectTraining):
    """One detector, trained on one COCO folder."""

    backbone: str = ""
    """A registered model (with its tag for released weights), or the folder of an exported
    student or of its run."""
    data: str = DRAWN
    """A folder with COCO annotations and images; `shapes` for synthetic ones."""
    out: Path = Path("runs/detector")
    """Folder of the run; it must not exist yet."""
    options: tuple[str, ...] = ()
    """Further keywords for the backbone, key=value."""

    def __post_init__(self):
        DetectTraining.__post_init__(self)
        DetectorChoice.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class DetectSettings(DetectorChoice):
    """How a detector is trained on a backbone; a detector of `zoo detect` is measured as it is."""

    training: DetectTraining = field(default_factory=DetectTraining)
    """The training; its data, device, seed and folder are those of the evaluation."""
    predictions: Path | None = None
    """File for the predictions, in COCO's format."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("data", "out", "device", "seed"):
            if getattr(self.training, name) != getattr(DetectTraining(), name):
                raise ValueError(
                    f"detect.training.{name} is the evaluation's own; leave it out (zoo eval has "
                    "--data and --seed)."
                )

    def run_of(self, **evaluation: Any) -> Detect:
        """Return the config of the training; `evaluation` has backbone, data, folder and seed."""
        own = {one.name: getattr(self, one.name) for one in fields(DetectorChoice)}
        return Detect(**vars(self.training) | own | evaluation)


def tiny(config: Detect) -> Detect:
    """Return the config for a trial on a laptop: small images, narrow heads, twenty steps."""
    every = replace(config.every, log=5)
    return replace(config, size=96, width=32, steps=20, batch=2, every=every)
