"""`zoo experiment compression`: what pruning, distillation and 2:4 do to a small hybrid.

Hybrids of Mamba-2, attention and feed-forward layers (transformers' Nemotron-H) learn the bytes of
the Python standard library, one for each seed. They are then cut: by width, against the same
size from scratch (`students`); by SSM heads, chosen inside their groups or across them (`heads`);
by SSM channels, the same in all heads or each head its own (`channels`); to 2:4 (`masks`). Bits per
byte on held-out files, paired by seed. An effect counts if its sign is the same in all seeds and
its mean exceeds twice the deviation over seeds: fixed before anything ran.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.teachers.name import unknown_name
from zoo.train.ranges import COUNT, POSITIVE, check_ranges

ARMS = ("heads", "channels", "students", "masks")
"""In the order in which they run."""


@dataclass(frozen=True)
class HybridShape:
    """The sizes of a hybrid; its names are those of compression's papers."""

    pattern: str = "M-M-*-M-M-*-"
    """Layers: M Mamba-2, * attention, - feed-forward."""
    dim: int = 512
    heads: int = 32
    """H: SSM heads, in `groups` groups."""
    channels: int = 32
    """P, of each SSM head."""
    groups: int = 8
    state: int = 64
    """N, of each group."""
    ffn: int = 2048
    attention: tuple[int, int, int] = (8, 2, 64)
    """Query heads, key heads, and their channels."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiment is."""

    shape: HybridShape = HybridShape()
    student: tuple[int, int, int] = (384, 1024, 16)
    """D, F and H of the student in `students`."""
    length: int = 512
    batch: int = 32
    teacher_bytes: float = 50e6
    teacher_rate: float = 1e-3
    shares: tuple[float, ...] = (0.75, 0.5)
    """Of heads, or of channels, that stay."""
    distilled_shares: tuple[float, ...] = (0.75, 0.5)
    """Those whose students are distilled too."""
    draws: int = 5
    """Random choices of heads."""
    distilled_draws: int = 5
    points: tuple[float, ...] = (1e6, 2.5e6)
    """Bytes of distillation after which cut heads and channels are measured."""
    rate: float = 5e-4
    """Of that distillation."""
    student_bytes: float = 5e6
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates of which each arm of `students` has its best."""
    mask_bytes: float = 10e6
    calibration: int = 256
    """Rows that scores look at."""
    removed: int = 16
    """Rows on which the loss without each head is measured."""
    held: int = 1280
    """Most held-out rows."""


_PILOT = HybridShape("M-M-*-M-", 128, 16, 16, 4, 16, 512, (4, 2, 32))
SCALES = {
    "full": Scale(),
    "small": Scale(
        teacher_bytes=32e6,
        distilled_shares=(0.5,),
        distilled_draws=1,
        student_bytes=2.5e6,
        mask_bytes=2.5e6,
        held=512,
    ),
    "pilot": Scale(
        shape=_PILOT,
        student=(96, 256, 8),
        length=96,
        batch=16,
        teacher_bytes=1e6,
        teacher_rate=3e-3,
        distilled_shares=(0.5,),
        distilled_draws=1,
        points=(115e3,),
        rate=1e-3,
        student_bytes=230e3,
        rates=(1e-3, 3e-3, 1e-2),
        mask_bytes=230e3,
        calibration=64,
        held=512,
    ),
    "tiny": Scale(
        shape=HybridShape("M*-", 32, 4, 8, 2, 8, 32, (2, 1, 16)),
        student=(16, 16, 2),
        length=32,
        batch=4,
        teacher_bytes=1024,
        shares=(0.5,),
        distilled_shares=(0.5,),
        draws=2,
        distilled_draws=1,
        points=(256,),
        student_bytes=256,
        rates=(1e-3,),
        mask_bytes=256,
        calibration=4,
        removed=2,
        held=4,
    ),
}
"""full: an H200, about half an hour. small: nine minutes of one. pilot: a CPU, an hour. tiny: a
test."""


@dataclass(frozen=True, kw_only=True)
class CompressionExperiment:
    """The compression experiment's size, arms and device."""

    scale: Literal["full", "small", "pilot", "tiny"] = "full"
    arms: tuple[str, ...] = ARMS
    seeds: Annotated[int, COUNT] = 3
    """Each has its own teacher, calibration rows and order of the data."""
    minutes: Annotated[float | None, POSITIVE] = None
    """Time for the whole experiment: a cell that may not end in it is not begun, and counted as
    left out in the result."""
    workers: Annotated[int, COUNT] = 1
    """Processes that train at the same time, on one device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the layers; auto does on CUDA."""
    out: Path = Path("runs/compression")
    resume: bool = False
    """Go on with the run in --out: what stands in its rows.jsonl is not trained again."""
    tiny: bool = False
    """The same as --scale tiny."""
    dry_run: bool = False
    """Print what would run, and exit."""

    def __post_init__(self):
        check_ranges(self)
        for arm in self.arms:
            if arm not in ARMS:
                raise unknown_name(arm, list(ARMS), "arm")

    @property
    def sizes(self) -> Scale:
        """The numbers of the scale."""
        return SCALES["tiny" if self.tiny else self.scale]


def full() -> CompressionExperiment:
    """Return the experiment in full."""
    return CompressionExperiment()


def tiny() -> CompressionExperiment:
    """Return the same experiment at its smallest."""
    return CompressionExperiment(scale="tiny", seeds=2, tiny=True)
