"""The PHI-S experiment, described: its arms, its sizes, its networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from zoo.teachers.name import unknown_name
from zoo.teachers.pretext import Gradients, PatchTransformer


@dataclass(frozen=True)
class Arm:
    """One way to compare a student's maps with the teachers'."""

    normalise: str
    """A kind of `zoo.train.distill.phi_s.KINDS`: the space in which the heads answer."""
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
"""The pair that differs by the rotation and by nothing else."""


@dataclass(frozen=True, kw_only=True)
class PhiSExperiment:
    """What is run, and how large."""

    data: tuple[Path, ...] = ()
    """Labelled image folders, shards or .npz; the digits and photographs that ship with
    scikit-learn and scikit-image if none."""
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = 5
    rotation_seeds: int = 16
    """Seeds of the second set, phi_s against alpha_only; 0 leaves it out."""
    together: int = 4
    """Seeds of the second set that are trained in one step."""
    steps: int = 2000
    batch: int = 512
    size: int = 96
    """Side of the images in pixels."""
    teacher_steps: int = 800
    teacher_seed: int = 0
    """Another one gives other teachers; those of a run are fixed."""
    limit: int | None = None
    """Pictures of each split at most."""
    seconds: float | None = None
    """Take fewer steps than --steps, and say so, where this would not suffice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the students; auto does on CUDA."""
    out: Path = Path("runs/phi_s")
    tiny: bool = False
    """Smallest networks and numbers: shows that it runs, in under a minute on a CPU."""
    dry_run: bool = False
    """Print what would run and how long it may take, and exit."""

    def __post_init__(self):
        for name in ("seeds", "together", "steps", "batch", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for arm in self.arms:
            if arm not in ARMS:
                raise unknown_name(arm, list(ARMS), "arm")
        if "phi_s" not in self.arms:
            raise ValueError("The arm phi_s is what the others are compared with; leave it in.")
        if self.size % 16:
            raise ValueError(f"size is {self.size}; it must be a multiple of the 16 px patches.")


def full() -> PhiSExperiment:
    """The experiment as it is meant."""
    return PhiSExperiment()


def tiny() -> PhiSExperiment:
    """The same experiment, as small as it goes."""
    return PhiSExperiment(
        seeds=2, rotation_seeds=2, together=2, steps=16, batch=16, size=48, teacher_steps=12,
        limit=96, tiny=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Set:
    """Students that are compared with each other."""

    name: str
    arms: tuple[str, ...]
    seeds: int
    together: int
    batch: int
    options: Mapping[str, int]
    """Keywords of the ViT."""
    hidden: int | None
    """Width of the heads; the widest teacher's if None."""


def sets_of(config: PhiSExperiment) -> list[Set]:
    """Return the set of all arms, and the pair that asks about the rotation."""
    large = dict(depth=6, embed_dim=192, num_heads=3)
    small = dict(depth=3, embed_dim=96, num_heads=3)
    if config.tiny:
        large, small = (dict(depth=d, embed_dim=32, num_heads=2) for d in (2, 1))
    arms = tuple(dict.fromkeys(config.arms))
    sets = [Set("arms", arms, config.seeds, 1, config.batch, large, None)]
    if config.rotation_seeds:
        # every seed has its own images, so this set costs mostly teachers: half the batch
        half, together = max(1, config.batch // 2), config.together
        sets.append(Set("rotation", ROTATION, config.rotation_seeds, together, half, small, 128))
    return sets


def networks(config: PhiSExperiment) -> dict[str, tuple[str, nn.Module]]:
    """Build the teachers' networks: label -> (pretext task, network).

    Scales: 0.03, 1.35 and 5.5 overall, log-normal gains of σ = 0.6, offsets; the last one's
    channel means reach about ±60, as SAM's do (2410.01680, table 7).
    """
    vit: dict[str, Any] = dict(
        dim=192, depth=12, num_heads=3, patch=16, mlp_ratio=4.0, size=config.size
    )
    widths, dim = (48, 96), 256
    if config.tiny:
        vit |= dict(dim=32, depth=2, num_heads=2)
        widths, dim = (16, 16), 32
    masked = vit | dict(depth=max(2, vit["depth"] // 2))
    return {
        "supervised": ("classifier", PatchTransformer(**vit, std=0.03, seed=1)),
        "masked": ("autoencoder", PatchTransformer(**masked, std=1.35, seed=2)),
        "edges": ("gradients", Gradients(dim, widths=widths, strides=(2, 2, 2), offset=4.0)),
    }
