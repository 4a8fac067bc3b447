"""Training of a model of images and text, described by frozen dataclasses."""

import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from zoo.teachers.name import TeacherName
from zoo.train.config import Augment, Every, Optim, Training
from zoo.train.distill.config import TeacherSpec
from zoo.train.distill.token_config import TokenLosses
from zoo.train.ranges import (
    BATCH,
    COUNT,
    NOT_NEGATIVE,
    PIXELS,
    PROPER_SHARE,
    at_least,
    check_ranges,
)

Part = Literal["tower", "projector", "language"]
VLM = "vlm"
TEACHERS = ("timm", "open_clip", "hf", "zoo", "torch", "rule")
"""Kinds of teachers of features; a cache knows the views of one run, and `pretext` is trained on
images alone."""
PARTS: tuple[Part, ...] = ("tower", "projector", "language")
PLAIN = TeacherSpec(name="rule:colour")
UNKNOWN = dict(
    rate="every teacher answers in every step",
    follow="images have one size for all steps",
    mosaic="a teacher sees each image by itself, as questions are about one",
    at="images have one size for all steps",
    place="each process has a whole copy",
)
"""Options of a teacher on images alone that a run of images and text has no use for, and why."""
FREEZE: dict[Part, str] = {
    "tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "language": "model.language_model,lm_head",
}
"""Part -> what `optim.freeze` calls it in transformers' Llava."""


@dataclass(frozen=True, kw_only=True)
class DistillImageText(Training):
    """One training of a vision tower, a projector and a language model."""

    kind: ClassVar[str] = "distill_image_text"
    unit: ClassVar[str] = "sample"
    one_measure: ClassVar[bool] = True

    data: str = ""
    """Questions about images: LLaVA's .json or .jsonl, a folder of webdataset's shards, a folder in
    easy-VQA's layout, or generated:N."""
    val: str | None = None
    """Questions to evaluate on; by default the data's own val, or a share of its images."""
    held_out: Annotated[float, PROPER_SHARE] = 0.05
    """Share of the images for evaluation, where the data has no val."""
    eval_samples: Annotated[int, COUNT] = 1000
    """Most questions that are evaluated on."""
    tower: tuple[str, ...] = ()
    """A vision tower, NAME[@SIZE]: a name of timm (a tag for its weights), local-dir:FOLDER,
    adaptors:RUN for a student with its heads, vlm:RUN for that of a trained model. Several are a
    mixture: each sees the image at its own size, and their channels are joined."""
    tower_options: tuple[str, ...] = ()
    """Further keywords of timm.create_model for a single tower, key=value: output_stride=8."""
    size: Annotated[int | None, PIXELS] = None
    """Side of the images in pixels, of towers whose name has none, and of a mixture's grid."""
    stride: Annotated[int | None, PIXELS] = None
    """Pixels of a cell of a mixture's grid, or of an adaptor tower's; by default the first
    encoder's, or the backbone's."""
    native: bool = False
    """Images keep their shape; otherwise each is brought to a square."""
    tokens: Annotated[int, COUNT] = 1024
    """Most tokens of an image."""
    shuffle: Annotated[int, COUNT] = 1
    """Cells of the grid along each side that are put into one token (pixel shuffle)."""
    normalizer: Literal["phi_s", "none"] = "phi_s"
    """Affine map inside of a new tower that gives its features variance 1, fitted on the first
    images of the data."""
    language: str = ""
    """The language model: lm:FOLDER, or a name such as llama_tiny/random."""
    tokenizer: str | None = None
    """bytes, or a folder; the language model's own by default."""
    start: Path | None = None
    """A run, or a folder of transformers, of images and text that all parts start from; with
    --tower that one takes the place of its own."""
    teachers: tuple[str, ...] = ()
    """Frozen models. vlm:RUN or vlm:FOLDER, of the same tokenizer and as many tokens an image,
    teaches answers (--losses.kl) and its tower's tokens (--vision). Any teacher of zoo distill
    (timm:, open_clip:, hf:, zoo:, torch:, rule:) teaches features: --vision 1; behind it
    ,spatial=W and ,summary=W are the weights of its map, 1, and of its summary, 0, which the mean
    of the tower's tokens learns, by ,loss=cosine (or angle, bce, cross_entropy)."""
    learn: tuple[Part, ...] = PARTS
    """Parts that learn; the others are frozen."""
    tower_lr: Annotated[float, NOT_NEGATIVE] = 1.0
    """Factor of the tower's learning rate."""
    language_lr: Annotated[float, NOT_NEGATIVE] = 1.0
    """Factor of the language model's."""
    length: Annotated[int, COUNT] = 2048
    """Most tokens of a conversation, images included; longer ones are left out."""
    batch: Annotated[int, BATCH] = 32
    out: Path = Path("runs/distill_image_text")
    """Folder of the run; it must not exist yet."""
    augment: Augment = field(default_factory=lambda: Augment(scale=(1.0, 1.0), flip=0.0))
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, weight_decay=0.05, ema=0.0))
    every: Every = field(default_factory=Every)
    losses: TokenLosses = field(default_factory=lambda: TokenLosses(kl=0.0, ce=1.0))
    vision: Annotated[float, at_least(0, "off")] = 0.0
    """Weight of the distance between the tower's tokens and each teacher's, through a learned
    projection where widths differ; teachers' are brought to variance 1."""

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self)
        if not self.learn or len(set(self.learn)) < len(self.learn):
            raise ValueError(
                f"learn is {', '.join(self.learn) or 'empty'}; name some of {', '.join(PARTS)}, "
                "each once."
            )
        if self.optim.freeze:
            raise ValueError(
                f"optim.freeze is {self.optim.freeze!r}; here the parts that learn are named: "
                "--learn projector."
            )
        if self.tower_options and len(self.tower) != 1:
            raise ValueError(
                f"tower_options are of one tower, and there are {len(self.tower)}; leave them out."
            )
        self._check_teachers()
        if self.augment.ratio != Augment().ratio:
            raise ValueError(
                f"augment.ratio is {self.augment.ratio}; crops of a run of images and text keep "
                "their image's shape: leave it out."
            )
        if self.losses.hidden or self.losses.routers:
            raise ValueError(
                "losses.hidden, losses.balance and losses.router_z are of zoo distill --text; "
                "leave them out."
            )

    def _check_teachers(self) -> None:
        vision = [name for name in self.teachers if vision_spec(name)]
        if vision and not self.vision:
            raise ValueError(
                f"{vision[0]} teaches features of images alone, and vision is 0: give --vision 1."
            )
        if self.losses.kl and len(vision) == len(self.teachers) > 0:
            raise ValueError(
                f"losses.kl is {self.losses.kl:g}, and no teacher writes text: name vlm:RUN as "
                "well, or give --losses.kl 0."
            )
        if bool(self.teachers) != bool(self.losses.kl or self.vision):
            raise ValueError(
                f"There are {len(self.teachers)} teachers, losses.kl is {self.losses.kl:g} and "
                f"vision {self.vision:g}: name --teachers vlm:RUN, or for vision timm:NAME, or "
                "leave both at 0."
            )

    @property
    def frozen(self) -> str:
        """What `optim.freeze` is, for the parts that do not learn."""
        if self.optim.lora:  # its adapters learn in place of the language model
            return ",".join(FREEZE[part] for part in PARTS if part not in (*self.learn, "language"))
        return ",".join(FREEZE[part] for part in PARTS if part not in self.learn)

    @property
    def labels(self) -> list[str]:
        """A short name for each teacher, unique in this run."""
        names = [_label(name) for name in self.teachers]
        return [f"{n}_{i + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _label(name: str) -> str:
    if spec := vision_spec(name):
        return TeacherName.parse(spec.name).label
    place = Path(name.partition(":")[2])
    # of a run's export, the name of the run; torch's modules take no dot
    own = (place.parent if place.name == "export" else place).name or "teacher"
    return re.sub(r"[^A-Za-z0-9_-]", "_", own)


def vision_spec(text: str) -> TeacherSpec | None:
    """Read a teacher of features; `None` for `vlm:`, which writes text as well.

    Raises:
        ValueError: there is no such kind, or it is one of runs on images alone.
    """
    kind = text.partition(":")[0]
    if kind == VLM:
        return None
    if kind not in TEACHERS:
        hint = get_close_matches(kind, (VLM, *TEACHERS), n=1)
        raise ValueError(
            f"--teachers {text}: a run of images and text has teachers of the kinds {VLM} (answers "
            f"and features) and {', '.join(TEACHERS)} (features)."
            + (f" Did you mean {hint[0]}:{text.partition(':')[2]}?" if hint else "")
        )
    spec = TeacherSpec.parse(text)
    if ",summary=" not in text:
        spec = replace(spec, summary=0.0)
    for name, why in UNKNOWN.items():
        if getattr(spec, name) != getattr(PLAIN, name):
            raise ValueError(
                f"--teachers {text}: {name}= is of runs on images alone; in one of images and "
                f"text {why}. Leave it out; spatial=, summary= and loss= are there."
            )
    return spec
