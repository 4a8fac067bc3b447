"""The settings of the benchmarks, which the command line shows. They are read without torch."""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.train.ranges import (
    BATCH,
    COUNT,
    LARGEST_BATCH,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    WORKERS,
    above,
    at_least,
    between,
    check_ranges,
)


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """The defaults are the protocol of DINO and AM-RADIO."""

    k: Annotated[int, COUNT] = 20
    temperature: Annotated[float, POSITIVE] = 0.07
    folds: Annotated[int, NOT_NEGATIVE] = 0
    """For small sets: parts of all images, each tested with the others as the bank; 0 tests the
    validation part."""
    confusion: bool = False
    """Draw the confusion matrix, and write its counts beside as CSV."""

    def __post_init__(self) -> None:
        check_ranges(self, "knn.")


STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
Solver = Literal["lbfgs", "ridge", "sgd"]


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How the linear classifier is fitted; of several values a held-out tenth decides."""

    solvers: tuple[Solver, ...] = ("lbfgs",)
    """lbfgs: logistic regression; ridge: least squares in closed form; sgd: for large data sets."""
    strengths: Annotated[tuple[float, ...], NOT_NEGATIVE] = STRENGTHS
    """Strengths of the L2 penalty; for ridge, relative to the mean eigenvalue."""
    widen: bool = True
    """Of lbfgs: while the best strength is the first or the last, try further ones, then the two
    beside the best."""
    max_steps: Annotated[int, COUNT] = 200
    """Iterations of L-BFGS."""
    folds: Annotated[int, NOT_NEGATIVE] = 0
    """For small sets: parts of all images, each tested after a fit to the others; 0 tests the
    validation part."""
    epochs: Annotated[int, COUNT] = 10
    """Epochs of SGD."""
    least_steps: Annotated[int, COUNT] = 1000
    """Fewest steps of SGD: a small set is trained on for more epochs."""
    batch: Annotated[int, BATCH] = 1024
    """Batch of SGD."""
    rates: Annotated[tuple[float, ...], POSITIVE] = (1e-3, 1e-2, 1e-1, 1.0)
    """Learning rates of SGD at a batch of 256; they are scaled with the batch."""
    confusion: bool = False
    """Draw the confusion matrix, and write its counts beside as CSV."""

    def __post_init__(self) -> None:
        check_ranges(self, "linear.")


@dataclass(frozen=True, kw_only=True)
class FewshotSettings:
    """How many images are drawn, how often, and how strongly the classifier is regularised."""

    shots: Annotated[tuple[int, ...], COUNT] = (1, 5, 10)
    """Images of each class; a number larger than the smallest class is left out."""
    draws: Annotated[int, COUNT] = 5
    """Number of random selections; the mean over them is reported."""
    strength: Annotated[float, NOT_NEGATIVE] = 1e-2
    """Strength of the L2 penalty; fixed, since there are too few images to choose it on."""

    def __post_init__(self) -> None:
        check_ranges(self, "fewshot.")


Corruption = Literal["gaussian_noise", "shot_noise", "brightness", "contrast", "pixelate", "jpeg"]


@dataclass(frozen=True, kw_only=True)
class SimilarSettings:
    """How images are ranked by an image."""

    ranks: Annotated[tuple[int, ...], COUNT] = (1, 5)
    """Ranks up to which a right image counts for the recall."""

    def __post_init__(self) -> None:
        check_ranges(self, "similar.")


@dataclass(frozen=True, kw_only=True)
class ClassifySettings:
    """Which of a classifier's outputs are right, and how its images are cropped."""

    layout: Literal[
        "auto", "imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "real", "own"
    ] = "auto"
    """Whose classes the folders are; auto goes by their names (imagenet-sketch is imagenet). real:
    ImageNet's validation images with their reassessed labels."""
    names: Path | None = None
    """JSON of the output (or several) for the name of each class; others are not scored."""
    crop_pct: Annotated[float | None, between(0.1, 1)] = None
    """Share of the resized image that the crop covers; the model's own by default."""
    bins: Annotated[int, COUNT] = 15
    """Bins of the calibration error."""
    corruptions: tuple[Corruption, ...] = ()
    """Corruptions of ImageNet-C (1903.12261) whose accuracy is measured too."""
    severities: Annotated[tuple[int, ...], between(1, 5)] = (1, 3, 5)
    """How strong they are, from 1 to 5."""
    confusion: bool = False
    """Draw the confusion matrix, and write its counts beside as CSV."""

    def __post_init__(self) -> None:
        check_ranges(self, "classify.")


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
    crop: Annotated[int, PIXELS] = 512
    """Side of a window, in pixels; the short side of an image is resized to it."""
    stride: Annotated[int | None, PIXELS] = None
    """Pixels from one window to the next when an image is measured; two thirds of the crop by
    default."""
    steps: Annotated[int, COUNT] = 40_000
    batch: Annotated[int, between(2, LARGEST_BATCH)] = 16
    lr: Annotated[float, POSITIVE] = 1e-3
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    warmup: Annotated[int, NOT_NEGATIVE] = 1500
    """Steps until the full rate is reached; at most a tenth of all steps."""
    backbone_lr: Annotated[float, at_least(0, "frozen")] = 0.0
    """Above 0, the backbone is trained too, at this rate (UPerNet: 6e-5)."""
    hidden: Annotated[int, between(1, 65_536)] = 512
    """Channels of UPerNet."""
    workers: Annotated[int, WORKERS] = 0
    """Processes that read images."""
    pictures: Annotated[int, NOT_NEGATIVE] = 6
    """Images of the validation part that are shown with their predictions."""

    def __post_init__(self) -> None:
        check_ranges(self, "segment.")
        check_stride(self.stride, self.crop)
        if self.backbone_lr and self.head == "linear":
            raise ValueError(
                "The linear head is for frozen features; leave out backbone_lr, or choose upernet."
            )


def check_stride(stride: int | None, crop: int) -> None:
    """Refuse windows between which there are gaps.

    Raises:
        ValueError: the stride is larger than the crop.
    """
    if stride is not None and stride > crop:
        raise ValueError(f"A stride of {stride} px leaves gaps between windows of {crop} px.")


FLOOR = 1e-3
"""Smallest depth in metres; logarithms of smaller ones would dominate the loss."""


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """How the linear layer is trained and measured."""

    crop: Annotated[int, PIXELS] = 480
    """Side of a window, in pixels; the short side of an image is resized to it."""
    stride: Annotated[int | None, PIXELS] = None
    """Pixels from one window to the next when an image is measured; two thirds of the crop by
    default."""
    steps: Annotated[int, COUNT] = 20_000
    batch: Annotated[int, between(2, LARGEST_BATCH)] = 16
    lr: Annotated[float, POSITIVE] = 1e-3
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    warmup: Annotated[int, NOT_NEGATIVE] = 1500
    """Steps until the full rate is reached; at most a tenth of all steps."""
    max_depth: Annotated[float, above(FLOOR)] = 10.0
    """Metres; larger depths are not scored. 10 for NYUd, 80 for KITTI."""
    scale: Annotated[float, POSITIVE] = 1e-3
    """Metres per unit of a 16-bit file: 1/1000 for NYUd, 1/256 for KITTI."""
    workers: Annotated[int, WORKERS] = 0
    """Processes that read images."""
    pictures: Annotated[int, NOT_NEGATIVE] = 4
    """Images of the validation part that are shown with their predictions."""

    def __post_init__(self) -> None:
        check_ranges(self, "depth.")
        check_stride(self.stride, self.crop)


@dataclass(frozen=True, kw_only=True)
class CorrespondenceSettings:
    """Which pairs of images are matched, and how finely."""

    layout: Literal["auto", "spair", "warps"] = "auto"
    """`spair`: the key points of SPair-71k (1908.10543); `warps`: each image and a copy of it under
    a known warp; `auto`: the first if its folders exist, otherwise the second."""
    split: str = "test"
    """The split of SPair-71k."""
    finer: Annotated[int, between(1, 64)] = 2
    """Factor by which the target's map is enlarged before a match is searched in it."""
    points: Annotated[int, between(1, 1024)] = 8
    """Points along each side of the grid of points in a warped image."""
    thresholds: Annotated[tuple[float, ...], POSITIVE] = (0.05, 0.1)
    """Largest distances that count as a match, as shares of the object's larger side (SPair) or of
    the image's side (warps)."""

    def __post_init__(self) -> None:
        check_ranges(self, "correspondence.")
        check_any("correspondence.thresholds", self.thresholds)


@dataclass(frozen=True, kw_only=True)
class SamMasksSettings:
    """Which decoder, which head of the student, and which points."""

    teacher: str = ""
    """The SAM from which the student learnt: hf:facebook/sam-vit-huge, or hf:FOLDER."""
    head: str = ""
    """The student's head for that teacher; by default the head with the teacher's label."""
    points: Annotated[int, between(1, 1024)] = 8
    """Points along each side of a regular grid; each point is the prompt of one mask."""
    pictures: Annotated[int, NOT_NEGATIVE] = 4
    """Images of which the masks of one point are shown."""

    def __post_init__(self) -> None:
        check_ranges(self, "masks.")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """How inference is timed: only the backbone, with images already on the device."""

    mode: str = "eager"
    """A mode of `zoo bench models`: eager or deploy, alone or +compiled, +autotuned or +graphs."""
    batch: Annotated[int | None, BATCH] = None
    """The evaluation's by default."""
    rounds: Annotated[int, COUNT] = 20
    """Timed batches, of which the median is used."""
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "speed.")


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Of how much text a language model's perplexity is taken, and with how much context."""

    length: Annotated[int, at_least(2)] = 512
    """Tokens in a row: a token sees those before it in its row."""
    rows: Annotated[int, COUNT] = 256
    """Rows from the beginning of the text; all if it has fewer."""

    def __post_init__(self) -> None:
        check_ranges(self, "perplexity.")


@dataclass(frozen=True, kw_only=True)
class CopyingSettings:
    """Strings of random letters that are to be written again."""

    lengths: Annotated[tuple[int, ...], COUNT] = (8, 16, 32, 64)
    """Letters in a string."""
    samples: Annotated[int, COUNT] = 64
    """Strings of each length."""
    shots: Annotated[int, NOT_NEGATIVE] = 1
    """Other strings that are written twice before, so that a model sees what is asked of it."""

    def __post_init__(self) -> None:
        check_ranges(self, "copying.")
        check_any("copying.lengths", self.lengths)


@dataclass(frozen=True, kw_only=True)
class PhonebookSettings:
    """Phone books, and a name whose number is asked for."""

    entries: Annotated[tuple[int, ...], COUNT] = (5, 10, 20)
    """Names in a book."""
    samples: Annotated[int, COUNT] = 64
    """Books of each size."""
    shots: Annotated[int, NOT_NEGATIVE] = 2
    """Names that are asked and answered before."""
    reversed: bool = False
    """Say in front of the book whose number will be asked for."""

    def __post_init__(self) -> None:
        check_ranges(self, "phonebook.")
        check_any("phonebook.entries", self.entries)
        if self.shots >= min(self.entries):
            raise ValueError(
                f"phonebook.shots is {self.shots}; of {min(self.entries)} entries at most "
                f"{min(self.entries) - 1} can be shown before another is asked for."
            )


@dataclass(frozen=True, kw_only=True)
class NeedleSettings:
    """A sentence with a number, hidden in a text of others."""

    lengths: Annotated[tuple[int, ...], COUNT] = (256, 512)
    """Tokens in all."""
    depths: Annotated[int, COUNT] = 5
    """Places where it is hidden, evenly from the beginning to the end."""
    samples: Annotated[int, COUNT] = 8
    """Texts of each length and place."""

    def __post_init__(self) -> None:
        check_ranges(self, "needle.")
        check_any("needle.lengths", self.lengths)


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings:
    """Tasks of lm-eval, whose files lie in the folder of --data."""

    tasks: tuple[str, ...] = ()
    """Names of tasks or groups; all tasks in the folder by default."""
    shots: Annotated[int | None, NOT_NEGATIVE] = None
    """Examples before each question; the task's own number by default."""
    limit: Annotated[int | None, COUNT] = None
    """Questions of each task, from the first on; all by default."""

    def __post_init__(self) -> None:
        check_ranges(self, "lmeval.")


@dataclass(frozen=True, kw_only=True)
class VqaSettings:
    """Questions about images, each answered in words."""

    samples: Annotated[int, NOT_NEGATIVE] = 0
    """Questions, in a random choice that the seed decides; 0 for all."""
    pictures: Annotated[int, NOT_NEGATIVE] = 12
    """Wrong answers whose pictures are kept beside --out."""

    def __post_init__(self) -> None:
        check_ranges(self, "vqa.")


@dataclass(frozen=True, kw_only=True)
class SightSettings:
    """Pictures that are drawn on the spot, each with one question."""

    samples: Annotated[int, COUNT] = 1000
    """Pictures, in turn of each kind."""
    pictures: Annotated[int, NOT_NEGATIVE] = 12
    """Wrong answers whose pictures are kept beside --out."""

    def __post_init__(self) -> None:
        check_ranges(self, "sight.")


@dataclass(frozen=True, kw_only=True)
class PrefillSettings:
    """The time to the first token."""

    size: Annotated[int, NOT_NEGATIVE] = 0
    """Side of the images in pixels; 0 for the tower's own."""
    text: Annotated[int, COUNT] = 64
    """Tokens of text behind the image."""
    batch: Annotated[int, COUNT] = 1
    rounds: Annotated[int, COUNT] = 20

    def __post_init__(self) -> None:
        check_ranges(self, "prefill.")


def check_any(name: str, values: Sized) -> None:
    """Refuse an empty list.

    Raises:
        ValueError: it is empty.
    """
    if not values:
        raise ValueError(f"{name} is empty; give one at least.")
