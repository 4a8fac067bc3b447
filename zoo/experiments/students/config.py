"""`zoo experiment students`: a student of each family, against its teachers and itself alone.

Three teachers with three objectives are trained on your pictures. Each family's student learns
from all three, without a label; the same backbone learns the labels alone, from the same start,
on the same crops, for as many steps. The pictures stay on the device, decoded: a run of `zoo
distill`, which decodes each image each time, would wait for its images here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from zoo.experiments.on_pictures import OnPictures
from zoo.teachers.name import unknown_name
from zoo.train.ranges import BATCH, COUNT, check_ranges

Family = tuple[str, dict[str, Any]]
"""A registered model, and keywords that make it small."""

FAMILIES: dict[str, Family] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "fastervit": ("fastervit_0", dict(dim=24, depths=(2, 3, 6, 5))),
    "mambavision": ("mambavision_t", dict(dim=32)),
    "eradio": ("eradio_xxxtiny", dict(dim=24, num_heads=(4, 8))),
}
"""The students of the families, of 5.0 to 5.8 M parameters each."""

TINY_FAMILIES: dict[str, Family] = {
    "vit": ("vit_tiny_patch16_224", dict(depth=2, embed_dim=32, num_heads=2)),
    "fastervit": ("fastervit_0", dict(dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2), stem_dim=8)),
    "mambavision": (
        "mambavision_t",
        dict(dim=8, depths=(1, 1, 2, 2), num_heads=(2, 2, 2, 2), stem_dim=8),
    ),
    "eradio": ("eradio_nano", {}),
}
"""The students of a test run on a laptop: of different sizes, and too small to learn much."""


@dataclass(frozen=True, kw_only=True)
class StudentsExperiment(OnPictures):
    """The students' experiment: its data, sizes and device."""

    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: Annotated[int, COUNT] = 3
    steps: Annotated[int, COUNT] = 500
    batch: Annotated[int, BATCH] = 256
    teacher_steps: Annotated[int, COUNT] = 1200
    out: Path = Path("runs/students")
    dry_run: bool = False
    """Print the models, and exit."""

    def __post_init__(self):
        check_ranges(self)
        if self.size % 32:
            raise ValueError(f"size is {self.size}; it must be a multiple of the stride 32.")
        for family in self.families:
            if family not in FAMILIES:
                raise unknown_name(family, list(FAMILIES), "family")

    @property
    def chosen(self) -> dict[str, Family]:
        """The students of the chosen families, full or tiny."""
        table = TINY_FAMILIES if self.tiny else FAMILIES
        return {family: table[family] for family in self.families}


def full() -> StudentsExperiment:
    """Return the experiment in full."""
    return StudentsExperiment()


def tiny() -> StudentsExperiment:
    """Return the same experiment at its smallest."""
    return StudentsExperiment(
        seeds=2, steps=8, batch=16, size=64, teacher_steps=8, limit=64, tiny=True
    )
