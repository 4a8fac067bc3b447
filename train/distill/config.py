"""A distillation, described by frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from zoo.data.names import Weighted, is_stream
from zoo.teachers.name import TeacherName
from zoo.train.config import Augment, Training
from zoo.train.ranges import (
    BATCH,
    CHANCE,
    COUNT,
    MOST_PIXELS,
    NOT_NEGATIVE,
    PIXELS,
    PROPER_SHARE,
    SHARE,
    above,
    at_least,
    between,
    check_ranges,
)

Normalise = Literal[
    "phi_s", "none", "global", "standardize", "alpha_only", "pca", "zca", "hadamard_whitening"
]
Place = Literal["replicate", "shard"]
SummaryLoss = Literal["run", "cosine", "angle", "bce", "cross_entropy"]


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A teacher in a run: its name and how much its two losses count."""

    name: str
    """`kind:name[/weights][@resolution]`"""
    summary: Annotated[float, at_least(0, "off")] = 1.0
    """Weight of the summary loss; 0 leaves the summary head out."""
    spatial: Annotated[float, at_least(0, "off")] = 1.0
    """Weight of the spatial loss; 0 leaves the spatial head out."""
    loss: SummaryLoss = "run"
    """Of its summary: cosine, angle; bce, if it is probabilities, each for itself; cross_entropy,
    if they add up to 1; with both the head answers with logits. run: that of losses.summary."""
    rate: Annotated[float, SHARE] = 1.0
    """Share of the steps in which the teacher is sampled; its losses then count 1/rate times."""
    follow: bool = False
    """Look at each step's student size, scaled so that both grids agree, not at its own size."""
    mosaic: Annotated[int, between(1, 64)] = 1
    """Images along a side of the teacher's canvas, each in a tile of it; 1 for the whole canvas."""
    at: Annotated[int, between(0, MOST_PIXELS, "any")] = 0
    """Side of the student's images in the steps that the teacher is sampled in."""
    place: Place = "replicate"
    """Of its weights on several processes: replicate is a whole copy on each; shard cuts its blocks
    over those of a node, and gathers each when it runs."""

    def __post_init__(self):
        TeacherName.parse(self.name)
        check_ranges(self, f"The teacher {self.name}: ")
        if self.place not in get_args(Place):
            raise ValueError(
                f"The teacher {self.name} has place={self.place}; it is replicate (a whole copy on "
                "each process) or shard (its blocks cut over those of a node)."
            )
        if self.loss not in get_args(SummaryLoss):
            raise ValueError(
                f"The teacher {self.name} has loss={self.loss}; the losses of a summary are "
                f"{', '.join(get_args(SummaryLoss))}."
            )
        if self.loss != "run" and not self.summary:
            raise ValueError(
                f"The teacher {self.name} has loss={self.loss} for its summary, and summary=0 "
                "leaves that out; drop one of them."
            )
        if not self.summary + self.spatial:
            raise ValueError(
                f"The teacher {self.name} has the loss weights 0 and 0; one must be above 0."
            )

    @classmethod
    def parse(cls, text: str) -> "TeacherSpec":
        """Read a name and options: `name,summary=0.5,rate=0.5,follow=1,mosaic=4,place=shard`."""
        name, *options = text.split(",")
        numbers: dict[str, Any] = {}
        words: dict[str, Any] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key in ("place", "loss"):
                words[key] = value
                continue
            if key not in ("summary", "spatial", "rate", "follow", "mosaic", "at"):
                raise ValueError(
                    f"{option!r} in {text!r}: a teacher's options are summary=, spatial=, loss=, "
                    "rate=, follow=, mosaic=, at=, place=."
                )
            try:
                numbers[key] = int(value) if key in ("mosaic", "at") else float(value)
            except ValueError:
                raise ValueError(f"{option!r} in {text!r} needs a number.") from None
        follow = numbers.pop("follow", 0.0)
        if follow not in (0, 1):
            raise ValueError(f"follow={follow:g} in {text!r}: it is 1 (yes) or 0 (no).")
        return cls(name=name, **numbers, **words, follow=bool(follow))

    def summary_loss(self, losses: "Losses") -> SummaryLoss:
        """Return the loss of its summary, by name."""
        return losses.summary if self.loss == "run" else self.loss

    def describe(self) -> str:
        """Write it as `parse` reads it."""
        text = self.name
        for key in ("summary", "spatial", "rate", "mosaic"):
            if getattr(self, key) != 1:
                text += f",{key}={getattr(self, key):g}"
        text += f",at={self.at}" if self.at else ""
        text += f",loss={self.loss}" if self.loss != "run" else ""
        text += f",place={self.place}" if self.place != "replicate" else ""
        return f"{text},follow=1" if self.follow else text


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What stands between the student and each teacher."""

    kind: Literal["v1", "v2", "attn", "ladder"] = "v2"
    """MLPs (v1, v2), two attention blocks before one (attn), or one on every block (ladder)."""
    hidden: Annotated[int | None, between(1, 65_536)] = None
    """Width of the hidden layers; the widest teacher's by default."""
    num_inner: Annotated[int, between(0, 64)] = 1
    """Hidden layers beyond the first; a ladder has none."""
    upsample: Annotated[int, between(1, 64)] = 1
    """Answer on a grid finer by this factor than the student's own."""

    def __post_init__(self):
        check_ranges(self, "heads.")

    def options(self) -> dict[str, Any]:
        """Return the heads as keywords of `build_student`, which exports keep as well."""
        return dict(
            kind=self.kind, hidden=self.hidden, inner=self.num_inner, upsample=self.upsample
        )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What the student minimises."""

    summary: Literal["cosine", "angle"] = "cosine"
    """angle is the squared angle over the teacher's own dispersion (C-RADIOv4)."""
    spatial: Literal["mse", "smooth_l1", "hybrid"] = "mse"
    """hybrid is a sum of cosine distance and smooth L1 (AM-RADIO)."""
    hybrid: Annotated[tuple[float, float], NOT_NEGATIVE] = (0.9, 0.1)
    """What cosine distance and smooth L1 count in hybrid."""
    beta: Annotated[float, above(0)] = 1.0
    """Where smooth L1 turns from quadratic to linear, in units of the normalised targets."""
    weighting: Literal["static", "adaloss", "uncertainty", "dispersion"] = "static"
    """What multiplies the teachers' own weights: nothing, the inverse of the running loss, a
    learned precision, or the inverse of what a constant guess loses in the same loss."""
    teacher_drop: Annotated[float, CHANCE] = 0.0
    """Chance that an image leaves a teacher out; its worst teacher always stays (UNIC)."""
    shift: Annotated[int, at_least(0, "off")] = 0
    """Largest shift, in student patches, between what student and teachers see of an image."""
    mesa: Annotated[float, at_least(0, "off")] = 0.0
    """Weight of the distance between the student's map and that of its average (C-RADIOv4), which
    sees the same crop without `shift`."""

    def __post_init__(self):
        check_ranges(self, "losses.")
        if len(self.hybrid) != 2 or not sum(self.hybrid):
            raise ValueError(
                f"losses.hybrid is {self.hybrid}; give what cosine distance and smooth L1 count, "
                "such as 0.9 0.1."
            )


class Group(NamedTuple):
    """The slices of a partition whose images have one size, in every step."""

    size: int
    slices: int
    images: int
    """Of a batch, in all of these slices."""


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """One distillation: many frozen teachers into one student."""

    kind: ClassVar[str] = "distill"
    may_cut: ClassVar[bool] = True
    one_measure: ClassVar[bool] = True
    before: ClassVar[Mapping[str, Any]] = {"decoder": "pillow"}
    resumable: ClassVar[frozenset[str]] = Training.resumable | {
        "speed",
        "compile_teachers",
        "overlap",
        "eval_images",
        "probe_images",
    }

    data: str = "embedded"
    """An image folder, webdataset shards (.tar or a folder of them), the URL of a folder of indexed
    shards, tables of Hugging Face's datasets (.arrow, .parquet or a folder of them), `embedded` or
    `embedded/photos`. Several with weights: PATH=0.7,PATH=0.3. What can only be read from front to
    back: stream:URL, as webdataset has it."""
    damaged_shards: Literal["error", "skip"] = "error"
    """Refuse shards that were cut or damaged, or that an index lists and that are missing; or leave
    them out."""
    labelled: str | None = None
    """Data with classes for kNN and the linear probe; `data` itself if it has classes."""
    teachers: tuple[TeacherSpec, ...] = ()
    """Teachers by name, e.g. timm:vit_small_patch14_dinov2.lvd142m@224"""
    student: str = "eradio_nano"
    """Any model that timm.create_model knows; local-dir:FOLDER, such as a pruned one, begins with
    the weights there."""
    student_options: tuple[str, ...] = ()
    """Keywords for timm.create_model, e.g. crop_positions=True, as Python writes their values."""
    spectral: bool = False
    """Train a ViT's matrices with a learned spectral norm, which the export folds in."""
    pretrained: bool = False
    """Start from the student's published weights."""
    start: Path | None = None
    """Start from the student of an earlier run (its folder, or its export), or from a file of
    weights, published ones of zoo's families included. Of a folder, the student, its options, size
    and heads are the defaults, and heads for the same teachers go on."""
    size: Annotated[int, PIXELS] = 224
    """Side of the student's images in pixels, as it is evaluated and exported."""
    sizes: Annotated[tuple[int, ...], PIXELS] = ()
    """Sides of which each training step draws one; `size` alone by default."""
    batches: Annotated[tuple[int, ...], BATCH] = ()
    """Images a step for each of `sizes`, `batch` at most; by default `batch` for all of them."""
    partition: Annotated[tuple[int, ...], COUNT] = ()
    """Shares of the slices, and so of the processes, that each of `sizes` has in every step (3 1 is
    three quarters and a quarter), in place of drawing a size; `batches`, if given, are then the
    images of each, which add up to `batch`."""
    attention_windows: Annotated[tuple[int, ...], at_least(0, "the whole image")] = ()
    """Sides, in patches, of windows in which most blocks of a RADIO student attend (ViTDet): each
    step draws one of those that tile its images. 0 is the whole image, and may be repeated."""
    out: Path = Path("runs/distill")
    """Folder of the run; it must not exist yet."""
    normalise: Normalise = "phi_s"
    """Scale on which the teachers' maps are matched."""
    normalise_summary: Literal["none", "standardize"] = "none"
    """Scale on which the teachers' summaries are matched; standardize is UNIC's."""
    compare: tuple[Normalise, ...] = ()
    """Train the same student again with these, and report them beside it."""
    calibration: Annotated[int, between(1, 1_000_000)] = 64
    """Batches from which the teachers' statistics are taken before step 0."""
    held_out: Annotated[float, PROPER_SHARE] = 0.05
    """Share of the images for evaluation, if the data has no split of its own."""
    eval_images: Annotated[int, COUNT] = 512
    """Most held-out images on which the teachers are compared."""
    probe_images: Annotated[int, COUNT] = 20_000
    """Most labelled images of each split for kNN and the linear probe."""
    teacher_precision: Literal["auto", "bf16", "int8", "fp8"] = "auto"
    """bf16 keeps the teachers' weights so, int8 and fp8 multiply in 8 bits as far as the fidelity
    to bf16 allows; auto is bf16 where the run is, on CUDA."""
    speed: Literal["auto", "compiled", "plain"] = "auto"
    """plain computes each step as it is written. auto takes more of a GPU: networks with
    convolutions in channels last, student and teachers compiled, the student in CUDA graphs (on one
    process), teachers one batch ahead. Its first steps are plain; where the rest is too short for
    compiling to pay, it stays so. compiled does not ask that. The log and about.json say what was
    chosen. It changes rounding and which random numbers drop paths draw; on a CPU it is plain."""
    compile_teachers: bool = False
    """Compile the teachers' blocks, for their one size, with speed plain too."""
    overlap: bool = False
    """Run the teachers on the next batch while the student learns from this one (CUDA), with speed
    plain too."""
    decoder: Literal["auto", "pillow", "torch"] = "auto"
    """What decodes images for training, settled when a run begins. auto is torch for a GPU, which
    takes two thirds of Pillow's time for JPEGs that are not shrunk to half, and pillow elsewhere.
    """
    view_epochs: Annotated[int, NOT_NEGATIVE] = 0
    """Epochs after which the augmented views repeat; 0 draws new ones in every epoch."""
    cache: Path | None = None
    """Folder of the teachers' features of those views, and of the held-out images: filled at first,
    read from then on. `{out}` in it is the run's own folder."""
    cache_dtype: Literal["int8", "bf16"] = "int8"
    """Of the features in a new cache."""
    heads: Heads = field(default_factory=Heads)
    losses: Losses = field(default_factory=Losses)
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes are {self.sizes}; give different numbers of pixels.")
        if self.partition:
            self._check_partition()
        elif self.batches:
            self._check_batches()
        for spec in self.teachers:
            if spec.at and spec.at not in (self.sizes or (self.size,)):
                raise ValueError(
                    f"The teacher {spec.name} is sampled at {spec.at} px, and the student is at "
                    f"{', '.join(map(str, self.sizes or (self.size,)))}."
                )
        others = len({*self.sizes} - {self.size})
        if others > self.calibration:
            raise ValueError(
                f"calibration is {self.calibration} batches, and {others} sizes beside the run's "
                f"own are measured in turn; give --calibration {others} or more."
            )
        if self.start and self.pretrained:
            raise ValueError(
                f"The student can start from {self.start} or be pretrained; leave out one of them."
            )
        if self.losses.mesa and not self.optim.ema:
            raise ValueError(
                "losses.mesa compares the student with its averaged weights, and optim.ema is 0; "
                "give it a decay such as 0.999."
            )
        if self.cache:
            self._check_cache()
        if self.device == "mps":
            raise ValueError(
                "A distillation measures its teachers in float64, which device mps does not have; "
                "give --device cpu."
            )
        if self.spectral and self.optim.lora:
            raise ValueError(
                "optim.lora adds adapters to plain weights, and spectral reparametrises them; "
                "leave one of them out."
            )
        if self.losses.mesa and self.optim.freeze == "trunk":
            raise ValueError(
                "losses.mesa compares the trunk with its average, and optim.freeze trunk leaves it "
                "as it is; leave one of them out."
            )
        self._check_places()
        self._check_labels()
        if is_stream(self.data):
            self._check_stream()
        else:
            Weighted.parse(self.data)  # refuses weights that mean nothing
        if self.normalise in self.compare:
            raise ValueError(f"compare repeats the run's own normalisation {self.normalise!r}.")

    def _check_cache(self) -> None:
        if not self.view_epochs:
            raise ValueError(
                f"view_epochs is {self.view_epochs}; a cache holds the views of 1 epoch or more "
                "(--view-epochs 1)."
            )
        if self.losses.shift or any(spec.follow for spec in self.teachers):
            raise ValueError(
                "A cache holds one map for each view, so it cannot serve shifted crops or teachers "
                "that follow the student's size; leave out cache, or losses.shift and follow=1."
            )

    def _check_batches(self) -> None:
        if len(self.batches) != len(self.sizes):
            raise ValueError(
                f"batches are {self.batches} for the sizes {self.sizes}; give --batches one number "
                "for each of --sizes, or none."
            )
        if max(self.batches) > self.batch or any(n % self.num_slices for n in self.batches):
            raise ValueError(
                f"batches are {self.batches}; each is at most batch, which is {self.batch}, and "
                f"splits into slices, which are {self.num_slices}."
            )

    def _check_stream(self) -> None:
        if self.cache or self.view_epochs:
            raise ValueError(
                f"{self.data} has no end, so its views do not repeat; leave out --cache and "
                "--view-epochs, or give shards that can be indexed."
            )
        names = map(TeacherName.parse, (spec.name for spec in self.teachers))
        if drawn := [name for name in names if name.kind == "pretext" and not name.weights]:
            raise ValueError(
                f"pretext:{drawn[0].name} is trained on the images first, and a stream shows them "
                "in its own order alone; give other --teachers, or shards that can be indexed."
            )

    def _check_places(self) -> None:
        cut = [spec.name for spec in self.teachers if spec.place == "shard"]
        if cut and self.teacher_precision in ("int8", "fp8"):
            raise ValueError(
                f"teacher_precision is {self.teacher_precision}, and the weights of {cut[0]} are "
                "to be cut as they are (place=shard); give --teacher-precision bf16, or leave out "
                "place=shard."
            )
        if cut and self.cache:
            raise ValueError(
                f"A cache answers for the teachers in training, so there is nothing to gain by "
                f"cutting {cut[0]}; leave out place=shard, or cache."
            )

    def _check_partition(self) -> None:
        if not len(self.sizes) == len(self.partition) > 1:
            raise ValueError(
                f"partition is {self.partition} for the sizes {self.sizes}; give --partition one "
                "number for each of two or more --sizes."
            )
        for spec in self.teachers:
            if spec.at and spec.place == "shard":
                raise ValueError(
                    f"The teacher {spec.name} is cut over all processes (place=shard), and with a "
                    f"partition only some run it (at={spec.at}); leave out one of the two."
                )
        if self.slices != "auto":
            assert self.groups  # which looks whether the slices and images can be shared out

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of a partition, in the order of their slices; none without one.

        Raises:
            ValueError: the slices do not share out as the partition says, or the images over them.
        """
        whole, slices = sum(self.partition), self.num_slices
        if not whole:
            return ()
        words = " ".join(map(str, self.partition))
        if slices % whole:
            near = max(1, round(slices / whole)) * whole
            raise ValueError(
                f"partition {words} shares out slices by {whole}, and a batch has {slices} "
                f"(--slices auto is the number of processes): start {near} processes, or give "
                f"--slices {near}, which fewer processes take in turn."
            )
        counts = [slices // whole * share for share in self.partition]
        images = self.batches or tuple(self.batch // slices * count for count in counts)
        uneven = any(n % count for n, count in zip(images, counts, strict=False))
        if len(images) != len(counts) or sum(images) != self.batch or uneven:
            raise ValueError(
                f"batches are {self.batches} for the partition {words}; they are one number for "
                f"each size, add up to batch, which is {self.batch}, and split into the slices of "
                f"the sizes, which are {', '.join(map(str, counts))}."
            )
        return tuple(map(Group, self.sizes, counts, images))

    @property
    def images_by_size(self) -> dict[int, int]:
        """The images of a batch that the student sees at each size; without a partition, those of
        a step of that size."""
        if groups := self.groups:
            return {group.size: group.images for group in groups}
        sizes = self.sizes or (self.size,)
        return dict(zip(sizes, self.batches or (self.batch,) * len(sizes), strict=True))

    @property
    def slice_images(self) -> dict[int, int]:
        """The images of a slice at each size of the student."""
        if groups := self.groups:
            return {group.size: group.images // group.slices for group in groups}
        return {size: n // self.num_slices for size, n in self.images_by_size.items()}

    @property
    def samples(self) -> float:
        if self.partition:
            return self.batch
        return sum(self.batches) / len(self.batches) if self.batches else self.batch

    def _check_labels(self) -> None:
        for spec, label in zip(self.teachers, self.labels, strict=True):
            if label in ("min", "geomean"):
                raise ValueError(
                    f"The teacher {spec.name} would be called {label}, which in the metrics is "
                    "that of all teachers together; give it another name."
                )

    @property
    def cache_folder(self) -> Path | None:
        """`cache`, with the run's folder in it."""
        return self.cache and Path(str(self.cache).replace("{out}", str(self.out)))

    @property
    def summary_losses(self) -> dict[str, SummaryLoss]:
        """The loss of each teacher's summary, by label."""
        return {
            label: spec.summary_loss(self.losses)
            for label, spec in zip(self.labels, self.teachers, strict=True)
        }

    @property
    def labels(self) -> list[str]:
        """A short name for each teacher, unique in this run."""
        labels: list[str] = []
        for spec in self.teachers:
            label = TeacherName.parse(spec.name).label
            while label in labels:
                label += "_2"
            labels.append(label)
        return labels
