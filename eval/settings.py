"""The settings of the benchmarks, which the command line shows. They are read without torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """The defaults are the protocol of DINO and AM-RADIO."""

    k: int = 20
    temperature: float = 0.07


STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
Solver = Literal["lbfgs", "ridge", "sgd"]


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How the linear classifier is fitted; of several values a held-out tenth decides."""

    solvers: tuple[Solver, ...] = ("lbfgs",)
    """lbfgs: logistic regression; ridge: least squares in closed form; sgd: for large data sets."""
    strengths: tuple[float, ...] = STRENGTHS
    """Strengths of the L2 penalty; for ridge, relative to the mean eigenvalue."""
    max_steps: int = 200
    """Iterations of L-BFGS."""
    epochs: int = 10
    """Epochs of SGD."""
    least_steps: int = 1000
    """Fewest steps of SGD: a small set is trained on for more epochs."""
    batch: int = 1024
    """Batch of SGD."""
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    """Learning rates of SGD at a batch of 256; they are scaled with the batch."""


@dataclass(frozen=True, kw_only=True)
class FewshotSettings:
    """How many images are drawn, how often, and how strongly the classifier is regularised."""

    shots: tuple[int, ...] = (1, 5, 10)
    """Images of each class; a number larger than the smallest class is left out."""
    draws: int = 5
    """Number of random selections; the mean over them is reported."""
    strength: float = 1e-2
    """Strength of the L2 penalty; fixed, since there are too few images to choose it on."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings:
    """Which text tower, which head of the student, and which sentences."""

    teacher: str = ""
    """Full name of the teacher with the text tower: open_clip:ViT-B-32/laion2b_s34b_b79k."""
    head: str = ""
    """The student's head for that teacher; by default the head with the teacher's label."""
    templates: Literal["openai", "simple", "plain"] = "openai"
    """open_clip's 80 (openai) or 7 (simple) sentences for ImageNet, or "a photo of a ..." alone."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """Which text tower, which head of the student, and which captions."""

    teacher: str = ""
    """Full name of the teacher with the text tower: open_clip:ViT-B-32/laion2b_s34b_b79k."""
    head: str = ""
    """The student's head for that teacher; by default the head with the teacher's label."""
    captions: str = ""
    """COCO's json of captions; by default `annotations/captions_val*.json` of the data."""
    images: str = ""
    """The folder of their images; by default one of `FOLDERS` in the data's folder."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """How a segmenter is trained and measured; the defaults are those of DINOv2's linear probe."""

    head: Literal["linear", "upernet"] = "linear"
    """`linear`: batch norm and one linear layer on the last map; `upernet`: 1807.10221."""
    layout: str = "auto"
    """ade20k, voc, cityscapes, camvid, folder, tar, or auto: recognised by the folders."""
    crop: int = 512
    """Side of a window, in pixels; the short side of an image is resized to it."""
    stride: int = 341
    """Pixels from one window to the next when an image is measured."""
    steps: int = 40_000
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 1500
    """Steps until the full rate is reached; at most a tenth of all steps."""
    backbone_lr: float = 0.0
    """Above 0, the backbone is trained too, at this rate (UPerNet: 6e-5)."""
    hidden: int = 512
    """Channels of UPerNet."""
    workers: int = 0
    """Processes that read images."""
    pictures: int = 6
    """Images of the validation part that are shown with their predictions."""

    def __post_init__(self) -> None:
        for name in ("crop", "stride", "steps", "batch", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.batch < 2:
            raise ValueError("Batch norm cannot learn from a batch of 1; take at least 2 crops.")
        if not self.lr > 0 or self.backbone_lr < 0 or self.weight_decay < 0:
            raise ValueError(
                f"The rate {self.lr:g} must be above 0; the backbone's rate {self.backbone_lr:g} "
                f"and the weight decay {self.weight_decay:g} must not be negative."
            )
        if self.stride > self.crop:
            raise ValueError(
                f"A stride of {self.stride} px leaves gaps between windows of {self.crop} px."
            )
        if self.backbone_lr and self.head == "linear":
            raise ValueError(
                "The linear head is for frozen features; leave out backbone_lr, or choose upernet."
            )


FLOOR = 1e-3
"""Smallest depth in metres; logarithms of smaller ones would dominate the loss."""


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """How the linear layer is trained and measured."""

    crop: int = 480
    """Side of a window, in pixels; the short side of an image is resized to it."""
    stride: int = 320
    """Pixels from one window to the next when an image is measured."""
    steps: int = 20_000
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 1500
    """Steps until the full rate is reached; at most a tenth of all steps."""
    max_depth: float = 10.0
    """Metres; larger depths are not scored. 10 for NYUd, 80 for KITTI."""
    scale: float = 1e-3
    """Metres per unit of a 16-bit file: 1/1000 for NYUd, 1/256 for KITTI."""
    workers: int = 0
    """Processes that read images."""
    pictures: int = 4
    """Images of the validation part that are shown with their predictions."""

    def __post_init__(self) -> None:
        if min(self.crop, self.stride, self.steps) < 1 or self.batch < 2:
            raise ValueError(
                "crop, stride and steps must be at least 1, and a batch at least 2 crops."
            )
        if not (self.lr > 0 and self.max_depth > FLOOR and self.scale > 0):
            raise ValueError("lr, max_depth and scale must be above 0.")
        if self.stride > self.crop:
            raise ValueError(
                f"A stride of {self.stride} px leaves gaps between windows of {self.crop} px."
            )


@dataclass(frozen=True, kw_only=True)
class CorrespondenceSettings:
    """Which pairs of images are matched, and how finely."""

    layout: Literal["auto", "spair", "warps"] = "auto"
    """`spair`: the key points of SPair-71k (1908.10543); `warps`: each image and a copy of it under
    a known warp; `auto`: the first if its folders exist, otherwise the second."""
    split: str = "test"
    """The split of SPair-71k."""
    finer: int = 2
    """Factor by which the target's map is enlarged before a match is searched in it."""
    points: int = 8
    """Points along each side of the grid of points in a warped image."""
    thresholds: tuple[float, ...] = (0.05, 0.1)
    """Largest distances that count as a match, as shares of the object's larger side (SPair) or of
    the image's side (warps)."""

    def __post_init__(self) -> None:
        if self.finer < 1 or self.points < 1 or not self.thresholds:
            raise ValueError("finer, points and the number of thresholds must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class SamMasksSettings:
    """Which decoder, which head of the student, and which points."""

    teacher: str = ""
    """The SAM from which the student learnt: hf:facebook/sam-vit-huge, or hf:FOLDER."""
    head: str = ""
    """The student's head for that teacher; by default the head with the teacher's label."""
    points: int = 8
    """Points along each side of a regular grid; each point is the prompt of one mask."""
    pictures: int = 4
    """Images of which the masks of one point are shown."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points is {self.points}; a mask needs at least one point.")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """How inference is timed: only the backbone, with images already on the device."""

    mode: str = "eager"
    """A mode of `zoo bench models`: eager or deploy, alone or +compiled, +autotuned or +graphs."""
    batch: int | None = None
    """The evaluation's by default."""
    rounds: int = 20
    """Timed batches, of which the median is used."""
    channels_last: bool = False
