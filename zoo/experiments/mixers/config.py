"""`zoo experiment mixers`: attention, Mamba-2, both, and StripedHyena 2, in small.

Four language models of equal size (Llama, Mamba-2, Nemotron-H, StripedHyena 2) learn the same bytes
in the same order: files of the Python standard library, and drills, which are phone books with
questions and strings that are written twice. Bits per byte on held-out files, phone books and
copying inside and beyond the sizes that were learnt, and the speed of generation behind contexts
of several lengths, for each seed. The order that An Empirical Study of
Mamba-based Language Models (2406.07887) found at 8B is held against what comes out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.teachers.name import unknown_name
from zoo.train.ranges import COUNT, FRACTION, POSITIVE, PROPER_SHARE, check_ranges

TOWERS = ("attention", "mamba2", "hybrid", "hyena", "hyena_only")
"""hyena has a layer of attention in seven, as published; hyena_only has none."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiment is."""

    dim: int = 512
    attention_layers: int = 7
    mamba_layers: int = 12
    """The parameters of these set the widths of the other towers' feed-forward layers."""
    hybrid: str = "M-M-M*-M-M-"
    hyena: str = "smlasml"
    hyena_only: str = "smlsmls"
    heads: int = 8
    key_heads: int = 4
    groups: int = 32
    """Filters of Hyena's short and medium operators."""
    state: int = 128
    """N of Mamba-2."""
    channels: int = 64
    """P of a head of Mamba-2."""
    length: int = 1024
    batch: int = 16
    megabytes: float = 40.0
    rate: float = 1e-3
    held: int = 256
    """Most held-out rows."""
    samples: int = 64
    """Phone books, and strings, of each size."""
    books: tuple[int, ...] = (5, 10, 20, 40)
    """Entries of the phone books that are measured."""
    strings: tuple[int, ...] = (16, 64, 128, 240)
    """Letters of the strings that are copied."""
    drilled: tuple[int, int] = (20, 128)
    """Most entries, and letters, in what is learnt; what is measured of larger ones is beyond."""
    watched: int = 8
    """Times that a tower is measured; recall on an eighth of the samples, but for the last time."""
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)
    texts: int = 16
    """Texts that are generated at a time."""
    generated: int = 32
    """Tokens that are timed."""


SCALES = {
    "full": Scale(),
    "pilot": Scale(
        dim=64, attention_layers=2, mamba_layers=4, hybrid="M-*-M-", hyena="smla", hyena_only="sml",
        heads=4, key_heads=4, groups=8, state=32, channels=16, length=128, batch=16, megabytes=4.1,
        rate=3e-3, held=16, books=(3, 4, 8), strings=(4, 8, 16, 24, 48), drilled=(4, 24),
        watched=10, contexts=(256, 1024), texts=4,
    ),
    "tiny": Scale(
        dim=32, attention_layers=2, mamba_layers=3, hybrid="M-*-", hyena="smla", hyena_only="sml",
        heads=2, key_heads=1, groups=4, state=8, channels=16, length=128, batch=4, megabytes=5e-3,
        held=2, samples=2, books=(3, 5), strings=(8, 16), drilled=(4, 12), watched=2,
        contexts=(64, 128), texts=2, generated=2,
    ),
}  # fmt: skip
"""full: an H200, a minute a tower and seed. pilot: a core, some minutes a tower. tiny: a test."""


@dataclass(frozen=True, kw_only=True)
class MixersExperiment:
    """The mixers experiment's size, towers and device."""

    scale: Literal["full", "pilot", "tiny"] = "full"
    towers: tuple[str, ...] = TOWERS[:4]
    """attention, mamba2, hybrid, hyena; hyena_only too."""
    seeds: Annotated[int, COUNT] = 3
    """All towers of a seed run before the next seed."""
    megabytes: Annotated[float | None, POSITIVE] = None
    """Text that each tower learns, in place of the scale's 40."""
    tasks: Annotated[float, PROPER_SHARE] = 0.5
    """Share of the rows that are drills. The study's models met such texts somewhere in a trillion
    tokens; in a few megabytes of code they do not stand."""
    weight: Annotated[float, POSITIVE] = 1.0
    """What drills count beside files: the mean over the bytes of their second halves, which alone
    are learnt, times this."""
    growing: Annotated[float, FRACTION] = 0.5
    """Share of the steps over which books and strings grow, from 2 entries and 4 letters."""
    rate: Annotated[float | None, POSITIVE] = None
    """Learning rate, in place of the scale's 0.001."""
    seconds: Annotated[float | None, POSITIVE] = None
    """Time for this call: what is being trained then is saved, and --resume goes on with it."""
    parts: tuple[Literal["train", "speed"], ...] = ("train", "speed")
    """What to do: train and measure towers; time their generation, while nothing else runs."""
    workers: Annotated[int, COUNT] = 1
    """Processes that train at the same time on one device, each its towers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the layers; auto does on CUDA."""
    out: Path = Path("runs/mixers")
    resume: bool = False
    """Go on with the run in --out: what stands in its rows.jsonl is not trained again."""
    tiny: bool = False
    """The same as --scale tiny."""
    dry_run: bool = False
    """Print what would run, and exit."""

    def __post_init__(self):
        check_ranges(self)
        for tower in self.towers:
            if tower not in TOWERS:
                raise unknown_name(tower, list(TOWERS), "tower")

    @property
    def sizes(self) -> Scale:
        """The numbers of the scale."""
        return SCALES["tiny" if self.tiny else self.scale]

    @property
    def steps(self) -> int:
        """Steps of each training."""
        step = self.sizes.batch * self.sizes.length
        return max(1, round(1e6 * (self.megabytes or self.sizes.megabytes) / step))


def full() -> MixersExperiment:
    """Return the experiment in full."""
    return MixersExperiment()


def tiny() -> MixersExperiment:
    """Return the same experiment at its smallest."""
    return MixersExperiment(scale="tiny", seeds=1, tiny=True)
