"""`zoo experiment phi_s`: does PHI-S (2410.01680) match all teachers, and does its rotation help?

Nine ways to bring three teachers onto one scale, with several seeds each, are trained on the same
crops in the same order. A second set of students, with more seeds, tests PHI-S's rotation alone.
The teachers are trained in the run. Their scales are imposed, those of table 7; their directions
and ranks are their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.experiments.on_pictures import OnPictures
from zoo.teachers.name import unknown_name
from zoo.train.ranges import BATCH, COUNT, NOT_NEGATIVE, check_ranges


@dataclass(frozen=True)
class Arm:
    """One way to compare a student's maps with the teachers'."""

    normalise: str
    """One of `zoo.train.distill.phi_s.KINDS`: the space in which the heads predict."""
    loss: str = "mse"
    """One of `zoo.train.distill.losses.SPATIAL_LOSSES`."""


ARMS = {
    "none": Arm("none"),
    "hybrid": Arm("none", "hybrid"),
    "global": Arm("global"),
    "alpha_only": Arm("alpha_only"),
    "standardize": Arm("standardize"),
    "phi_s": Arm("phi_s"),
    "pca": Arm("pca"),
    "zca": Arm("zca"),
    "hadamard_whitening": Arm("hadamard_whitening"),
}
ROTATION = ("phi_s", "alpha_only")
"""The pair of arms that differ by the rotation alone."""


@dataclass(frozen=True, kw_only=True)
class PhiSExperiment(OnPictures):
    """The PHI-S experiment's data, sizes and device."""

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: Annotated[int, COUNT] = 5
    rotation_seeds: Annotated[int, NOT_NEGATIVE] = 16
    """Seeds of the second set, phi_s against alpha_only; 0 to leave it out."""
    together: Annotated[int, COUNT] = 4
    """Seeds of the second set that are trained together in one step."""
    steps: Annotated[int, COUNT] = 2000
    batch: Annotated[int, BATCH] = 512
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the students; auto does on CUDA."""
    out: Path = Path("runs/phi_s")
    dry_run: bool = False
    """Print what would run and how long it may take, and exit."""

    def __post_init__(self):
        check_ranges(self)
        for arm in self.arms:
            if arm not in ARMS:
                raise unknown_name(arm, list(ARMS), "arm")
        if "phi_s" not in self.arms:
            raise ValueError(
                "The arm phi_s is what the others are compared with; add it to --arms."
            )
        if self.size % 16:
            raise ValueError(f"size is {self.size}; it must be a multiple of the 16 px patches.")


def full() -> PhiSExperiment:
    """Return the experiment in full."""
    return PhiSExperiment()


def tiny() -> PhiSExperiment:
    """Return the same experiment at its smallest."""
    return PhiSExperiment(
        seeds=2,
        rotation_seeds=2,
        together=2,
        steps=16,
        batch=16,
        size=48,
        teacher_steps=12,
        limit=96,
        tiny=True,
    )


@dataclass(frozen=True)
class StudentSet:
    """Students of one shape that are compared with each other: all arms, for several seeds."""

    name: str
    arms: tuple[str, ...]
    seeds: int
    together: int
    """Seeds that are trained together in one step."""
    batch: int
    options: Mapping[str, int]
    """Keywords of the ViT."""
    hidden: int | None
    """Hidden width of the heads; `None` for the widest teacher's."""


def sets_of(config: PhiSExperiment) -> list[StudentSet]:
    """Return the set of all arms, and the one that tests the rotation alone."""
    large = dict(depth=6, embed_dim=192, num_heads=3)
    small = dict(depth=3, embed_dim=96, num_heads=3)
    if config.tiny:
        large, small = (dict(depth=d, embed_dim=32, num_heads=2) for d in (2, 1))
    arms = tuple(dict.fromkeys(config.arms))
    sets = [StudentSet("arms", arms, config.seeds, 1, config.batch, large, None)]
    if config.rotation_seeds:
        # every seed has its own images, so the teachers are most of the cost: half the batch
        half, together = max(1, config.batch // 2), config.together
        sets.append(
            StudentSet("rotation", ROTATION, config.rotation_seeds, together, half, small, 128)
        )
    return sets
