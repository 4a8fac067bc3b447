"""N of each M weights of a model, described by frozen dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from zoo.data.names import is_stream
from zoo.train.config import Augment, Optim, Training
from zoo.train.distill.config import Distill, Heads, Losses, Normalise, TeacherSpec
from zoo.train.distill.token_config import DistillText, TokenLosses
from zoo.train.ranges import COUNT, NOT_NEGATIVE, PROPER_SHARE, between

Choice = Literal["magnitude", "wanda", "sparsegpt", "learned"]
ONE_SHOT: tuple[Choice, ...] = ("magnitude", "wanda", "sparsegpt")
PARENT = "parent"
"""The label of the dense model among the teachers of its masks."""


def _optim() -> Optim:
    return Optim(lr=1e-3, weight_decay=0.1, ema=0.0)


@dataclass(frozen=True, kw_only=True)
class MaskChoice:
    """Which weights stay."""

    pattern: str = "2:4"
    """N:M: of each M consecutive weights along a layer's inputs, N stay."""
    method: Choice = "sparsegpt"
    """magnitude, wanda and sparsegpt look once; learned trains the choice, weights frozen
    (MaskLLM)."""
    prior: str = "magnitude"
    """Where learned masks begin: magnitude, wanda, sparsegpt, none; or a run of zoo mask on the
    same model, whose masks are learnt on for this data (MaskLLM's transfer)."""
    weight_reg: Annotated[float, NOT_NEGATIVE] = 1e-5
    """Of learned masks: reward for the squares of the weights that stay (MaskLLM, section 3.3)."""


@dataclass(frozen=True, kw_only=True)
class Mask(MaskChoice, DistillText):
    """One language model, of which N of each M weights stay."""

    kind: ClassVar[str] = "mask"
    may_cut: ClassVar[bool] = False

    calibration: Annotated[int, COUNT] = 128
    """Rows of text that wanda and sparsegpt look at."""
    steps: Annotated[int, COUNT] = 2000
    """Of learned masks."""
    out: Path = Path("runs/mask")
    """Folder of the run; it must not exist yet."""
    optim: Optim = field(default_factory=_optim)
    losses: TokenLosses = field(default_factory=lambda: TokenLosses(kl=0.0, ce=1.0))


@dataclass(frozen=True, kw_only=True)
class MaskImages(MaskChoice, Training):
    """One vision model, of which N of each M weights stay."""

    kind: ClassVar[str] = "mask_images"

    student: str = ""
    """A name of timm or zoo (/random for random weights), a folder of timm, or a run."""
    data: str = "embedded"
    """An image folder, webdataset shards, `embedded` or `embedded/photos`."""
    labelled: str | None = None
    """Data with classes for kNN and the linear probe; `data` itself if it has classes."""
    teachers: tuple[TeacherSpec, ...] = ()
    """Of learned masks, others than the dense model itself, which always teaches; with heads."""
    calibration: Annotated[int, between(1, 1_000_000)] = 16
    """Batches that wanda and sparsegpt look at, and that teachers are measured on."""
    steps: Annotated[int, COUNT] = 2000
    """Of learned masks."""
    out: Path = Path("runs/mask")
    """Folder of the run; it must not exist yet."""
    normalise: Normalise = "phi_s"
    """Scale on which the teachers' maps are matched."""
    held_out: Annotated[float, PROPER_SHARE] = 0.05
    """Share of the images for evaluation, if the data has no split of its own."""
    eval_images: Annotated[int, COUNT] = 512
    """Most held-out images on which the model is compared with its teachers."""
    probe_images: Annotated[int, COUNT] = 20_000
    """Most labelled images of each split for kNN and the linear probe."""
    optim: Optim = field(default_factory=_optim)
    heads: Heads = field(default_factory=Heads)
    losses: Losses = field(default_factory=Losses)
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self):
        super().__post_init__()
        if self.teachers and self.method != "learned":
            raise ValueError(
                f"The method {self.method} has no teachers; leave out --teachers, or give "
                "--method learned."
            )
        if is_stream(self.data):
            raise ValueError(
                f"{self.data} is a stream, and masks are found on images of all the data; give a "
                "folder, or shards that can be indexed."
            )
        if self.optim.ema or self.losses.mesa:
            raise ValueError(
                f"optim.ema is {self.optim.ema} and losses.mesa {self.losses.mesa:g}; the average "
                "of masks is none, so give 0 for both."
            )
        self.distillation()

    def distillation(self, **fields: Any) -> Distill:
        """Return the distillation that the masks are learnt by; it makes its own checks."""
        shared = (
            "data", "labelled", "batch", "slices", "steps", "seed", "device", "precision",
            "workers", "normalise", "calibration", "held_out", "eval_images", "probe_images",
            "optim", "every", "heads", "losses", "augment",
        )  # fmt: skip
        mine = {name: getattr(self, name) for name in shared}
        # the dense model answers as it is, behind no head: its name is for messages
        parent = TeacherSpec(name=f"timm:{PARENT}")
        return Distill(**mine, teachers=(parent, *self.teachers), **fields)
