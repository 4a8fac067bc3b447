"""A detector and its training, described by frozen dataclasses."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from zoo.train.config import Optim, Precision, Training

Kind = Literal["mask_rcnn", "faster_rcnn", "retinanet", "detr", "rt_detr_v2", "mask2former"]
DRAWN = "shapes"
"""As `data`: coloured shapes that are drawn into the run's own folder."""


@dataclass(frozen=True, kw_only=True)
class DetectTraining(Training):
    """How a detector is trained, whatever its backbone."""

    kind: ClassVar[str] = "detect"

    batch: int = 16
    optim: Optim = field(
        default_factory=lambda: Optim(lr=2e-4, min_lr=0.0, weight_decay=0.05, ema=0.0)
    )
    backbone_lr: float = 1.0
    """The backbone's rate is that of the new parts times this, and times `layer_decay`."""
    layer_decay: float = 1.0
    """Factor from each layer of the backbone to the one before it; 1 for none."""
    precision: Precision = "auto"
    """Of the backbone and the pyramid; auto is bf16 on CUDA and float32 elsewhere. What places
    boxes stays in float32."""
    workers: int = 0
    """Processes that decode; with 0 the images are decoded once and held in memory."""
    norms: Literal["trained", "frozen"] = "trained"
    """`frozen`: batch norms of the backbone keep their statistics, for trained ones and batches
    of a few images."""

    def __post_init__(self):
        super().__post_init__()
        rates = dict(lr=self.optim.lr, backbone_lr=self.backbone_lr, layer_decay=self.layer_decay)
        for name, value in rates.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give a number above 0.")
        if self.layer_decay > 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; give at most 1, which is none.")
        if self.precision == "float64":
            raise ValueError("A detector's boxes are float32; give precision float32 or bf16.")


@dataclass(frozen=True, kw_only=True)
class DetectorChoice:
    """Which detector is built over a backbone, whatever trains it."""

    detector: Kind = "mask_rcnn"
    size: int = 512
    """Pixels of the longer side of an image, a multiple of 32."""
    width: int = 256
    """Channels of the pyramid and of the heads."""
    class_agnostic: bool = False
    """Learn and measure boxes alone, whatever their class."""
    pictures: int = 8
    """Images of the validation part that are drawn with what was found."""

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width is {self.width}; give 1 or more.")

    @property
    def has_masks(self) -> bool:
        """Tell whether the detector learns and gives masks."""
        return self.detector in ("mask_rcnn", "mask2former")


@dataclass(frozen=True, kw_only=True)
class Detect(DetectorChoice, DetectTraining):
    """One detector, trained on one COCO folder."""

    backbone: str = ""
    """A registered model (with its tag for released weights), or the folder of an exported
    student or of its run."""
    data: str = DRAWN
    """A folder with COCO annotations and images; `shapes` draws some."""
    out: Path = Path("runs/detector")
    """Folder of the run; it must not exist yet."""
    options: tuple[str, ...] = ()
    """Further keywords for the backbone, key=value."""

    def __post_init__(self):
        DetectTraining.__post_init__(self)
        DetectorChoice.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class DetectSettings(DetectorChoice):
    """A target that `zoo detect` trained is measured as it is; for others these decide."""

    training: DetectTraining = field(default_factory=DetectTraining)
    """Data, device, seed and folder are those of the evaluation."""
    predictions: Path | None = None
    """Where COCO's file of predictions goes."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("data", "out", "device", "seed"):
            if getattr(self.training, name) != getattr(DetectTraining(), name):
                raise ValueError(
                    f"detect.training.{name} is the evaluation's own; leave it out (zoo eval has "
                    "--data and --seed)."
                )

    def run_of(self, **evaluation: Any) -> Detect:
        """Return the training of a detector; `evaluation` gives backbone, data, folder, seed."""
        own = {one.name: getattr(self, one.name) for one in fields(DetectorChoice)}
        return Detect(**vars(self.training) | own | evaluation)


def tiny(config: Detect) -> Detect:
    """Shrink a run to a laptop: small images, narrow heads, twenty steps."""
    every = replace(config.every, log=5)
    return replace(config, size=96, width=32, steps=20, batch=2, every=every)
