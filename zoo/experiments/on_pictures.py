"""What experiments share whose teachers are trained in the run, on labelled pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.train.ranges import COUNT, PIXELS, POSITIVE, SEED


@dataclass(frozen=True, kw_only=True)
class OnPictures:
    """Pictures, teachers, time and device of an experiment."""

    data: tuple[Path, ...] = ()
    """Labelled image folders, shards or .npz; by default the digits and photographs that ship
    with scikit-learn and scikit-image."""
    size: Annotated[int, PIXELS] = 96
    """Side of the images in pixels."""
    teacher_steps: Annotated[int, COUNT] = 800
    teacher_seed: Annotated[int, SEED] = 0
    """Seed of the teachers, which all students of a run share."""
    limit: Annotated[int | None, COUNT] = None
    """Most pictures of each split of each data set."""
    seconds: Annotated[float | None, POSITIVE] = None
    """Seconds for the whole experiment: if --steps would take longer, fewer are trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    tiny: bool = False
    """Use the smallest networks and numbers: a test run of under a minute on a CPU."""
    out: Path = Path("runs/experiment")
    """Folder of the run."""
