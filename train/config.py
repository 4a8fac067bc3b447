"""A run, described by frozen dataclasses: for the command line, recipes and run folders."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from zoo.train.ranges import (
    BATCH,
    CHANCE,
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    WORKERS,
    at_least,
    below,
    between,
    check_ranges,
)

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bf16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and a schedule behind it."""

    lr: Annotated[float, POSITIVE] = 1e-3
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.02
    betas: Annotated[tuple[float, float], below(0, 1)] = (0.9, 0.999)
    warmup: Annotated[float, FRACTION] = 0.05
    """Share of the steps in which the rate rises."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How it falls to min_lr: half a cosine from the end of the warm-up on, or a line from the
    first step to the last, times the warm-up."""
    clip: Annotated[float, at_least(0, "off")] = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    ema: Annotated[float | Literal["auto"], below(0, 1, "off")] = "auto"
    """Average of the weights: auto for a mean age of a twentieth of the steps so far, so that
    nothing is left of the first weights; a decay for no longer a memory; 0 for none. Of average and
    last weights, a distillation of images exports those with the higher geometric-mean fidelity on
    held-out images."""
    drop_path: Annotated[float, below(0, 1, "off")] = 0.0
    layer_decay: Annotated[float, SHARE] = 1.0
    """Factor of the rate from each block of the backbone to the one before it; 1 for one rate."""
    freeze: str = ""
    """What stays as it is: trunk (only the heads learn), a number for the stem and the first blocks
    of the trunk, or names of its parts with commas between."""
    lora: Annotated[int, between(0, 1024, "off")] = 0
    """Rank of adapters (LoRA, by peft) that learn in place of the trunk, and are added to it before
    the export; 0 for none."""
    lora_layers: tuple[str, ...] = ()
    """Layers that get one, by the ends of their names (qkv, mlp.fc1); by default all linear ones.
    """
    damp: Annotated[float, at_least(0, "off")] = 0.0
    """Deviation of the multiplicative noise on the weights of each step (DAMP); 0 for none."""

    def __post_init__(self):
        check_ranges(self, "optim.")
        if self.lora and self.freeze:
            raise ValueError(
                f"optim.lora freezes the whole trunk below its adapters; leave out optim.freeze "
                f"{self.freeze}, or optim.lora."
            )
        if self.lora_layers and not self.lora:
            raise ValueError("optim.lora_layers is for adapters; give their rank with optim.lora.")
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr is {self.min_lr:g}, above optim.lr, which is {self.lr:g}; the rate "
                "falls from the one to the other."
            )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random crops and mirror images."""

    scale: Annotated[tuple[float, float], SHARE] = (0.5, 1.0)
    """Least and largest share of the image that a crop covers."""
    ratio: Annotated[tuple[float, float], POSITIVE] = (3 / 4, 4 / 3)
    """Least and largest ratio of a crop's width to its height, before it is made a square. Whoever
    wants whole images, as they are, says scale 1 1 and ratio 1 1."""
    flip: Annotated[float, CHANCE] = 0.5

    def __post_init__(self):
        check_ranges(self, "augment.")
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(
                f"augment.ratio is {self.ratio}; its first number is the smaller ratio."
            )
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"augment.scale is {self.scale}; its first number is the smaller share."
            )


@dataclass(frozen=True, kw_only=True)
class Every:
    """How often things happen, in steps."""

    log: Annotated[int, COUNT] = 10
    checkpoint: Annotated[int, COUNT] = 500
    evaluate: Annotated[int, COUNT] = 500

    def __post_init__(self):
        check_ranges(self, "every.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that every task of the training loop has; a task's own config adds more."""

    kind: ClassVar[str]
    """The task's name, in the config.json of its runs."""
    unit: ClassVar[str] = "img"
    """What speed is counted in."""
    may_cut: ClassVar[bool] = False
    """Whether its weights may be cut over ranks (`--ranks fsdp`)."""
    one_measure: ClassVar[bool] = False
    """Whether its evaluation ends in one number, the higher the better (`keep_best`)."""
    before: ClassVar[Mapping[str, Any]] = {}
    """What was done before there was a field to choose it, for folders of older runs."""
    resumable: ClassVar[frozenset[str]] = frozenset(
        (
            "out",
            "device",
            "workers",
            "every",
            "compile",
            "ranks",
            "keep",
            "keep_best",
            "profile",
            "track",
        )
    )
    """Fields that a resumed run may change: they do not touch what is learnt."""

    data: str = "embedded"
    batch: Annotated[int, BATCH] = 32
    """Samples a step, over all slices."""
    slices: Annotated[int | Literal["auto"], COUNT] = "auto"
    """Equal parts of each batch that one process takes one after another, for batches that do not
    fit the memory; each has randomness and batch statistics of its own. auto is 1."""
    steps: Annotated[int, COUNT] = 1000
    out: Path = Path("runs/train")
    """Folder of the run; it must not exist yet."""
    seed: Annotated[int, SEED] = 0
    ranks: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """What each process of several keeps: ddp a copy of the student, fsdp its share of the weights,
    hsdp its share of those of its node. auto is ddp below 10^9 parameters, hsdp from there on."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere. float64, weights too, is for tests on
    a CPU."""
    compile: bool = False
    workers: Annotated[int | Literal["auto"], WORKERS] = "auto"
    """Processes that read samples. auto is, for a GPU, one for each core but one (none on one or
    two cores), shared out over the processes of the machine; 0, in the process itself, elsewhere.
    """
    keep: Annotated[int, COUNT] = 2
    """The newest checkpoints that stay; with 1 a damaged one has none before it."""
    keep_best: bool = False
    """Keep the checkpoint of the best evaluation as well, for zoo export --best."""
    track: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Where numbers are shown besides the run's folder and TensorBoard; into files, unless the
    tracker's own variables (WANDB_MODE, MLFLOW_TRACKING_URI) say otherwise."""
    profile: bool = False
    """Profile 20 steps once the run is warm: profile.txt says where the time of a step goes,
    profile.json is a trace for ui.perfetto.dev."""
    optim: Optim = field(default_factory=Optim)
    every: Every = field(default_factory=Every)

    def __post_init__(self):
        check_ranges(self)
        slices = self.num_slices
        if self.batch % slices:
            fits = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - slices))[:3])
            raise ValueError(
                f"A batch of {self.batch} does not split into {slices} slices of equal size; "
                f"{', '.join(map(str, near))} would do."
            )
        if self.precision == "float64" and self.device in ("cuda", "mps"):
            raise ValueError("precision float64 is for tests on a CPU; give --device cpu with it.")
        if self.keep_best and not self.one_measure:
            raise ValueError(
                "keep_best is for zoo distill and zoo detect, whose evaluation ends in one number; "
                "leave it out."
            )

    @property
    def samples(self) -> float:
        """What a step counts for, in `unit`, on average over the steps."""
        return self.batch

    @property
    def ranks_a_slice(self) -> int:
        """Processes that take a slice together, each a part of its rows."""
        return 1

    @property
    def num_slices(self) -> int:
        """The slices of each batch, `auto` resolved."""
        return 1 if self.slices == "auto" else self.slices


C = TypeVar("C", bound=Training)


def to_json(config: Training) -> dict[str, Any]:
    """Turn a config into plain data."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differences(old: Training, new: Training) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two runs differ and that a resumed run may not change.

    A field inside another is called as on the command line (`optim.lr`), one of a teacher as
    `teachers[NAME].rate`.
    """
    before, after = to_json(old), to_json(new)
    kept = [name for name in before if name not in new.resumable]
    return {key: both for name in kept for key, both in _differ(before[name], after[name], name)}


def _differ(before: Any, after: Any, name: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield where two values differ, and both of them there."""
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from _differ(before.get(key), after.get(key), f"{name}.{key}")
        return
    ours, theirs = _names(before), _names(after)
    if ours and ours == theirs:
        for one, other in zip(before, after, strict=True):
            yield from _differ(one, other, f"{name}[{one['name']}]")
    else:
        yield name, (ours, theirs) if ours or theirs else (before, after)


def _names(items: Any) -> list[str]:
    """Return the names of a list of teachers; empty for anything else."""
    named = isinstance(items, list) and all(isinstance(i, dict) and "name" in i for i in items)
    return [item["name"] for item in items] if named else []
