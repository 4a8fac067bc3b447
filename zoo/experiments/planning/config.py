"""`zoo experiment planning`: what teachers that are rules add to imitating a driver (Hydra-MDP).

Pictures of scenes from above are drawn: a road that bends, things on it, the car's speed. A student
that imitates the driver's trajectory is held against one that also learns what five rules say of
every trajectory (2406.06978), both by `zoo distill` itself, on the same pictures for as many steps.
On scenes that neither has seen: how often the trajectory that is taken hits something or leaves the
road, and what it is worth in all, beside the one trajectory that is best without looking.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.train.ranges import BATCH, COUNT, POSITIVE, WORKERS, check_ranges


@dataclass(frozen=True, kw_only=True)
class PlanningExperiment:
    """The planning experiment: its scenes, student and device."""

    scenes: Annotated[int, COUNT] = 16384
    """Scenes to learn from."""
    held: Annotated[int, COUNT] = 1024
    """Scenes that neither student learns from: so many to choose the weights of the scores, and as
    many again to measure on."""
    size: Literal[32, 64, 96, 128] = 64
    """Side of a scene in pixels."""
    student: str = "resnet18"
    """Any model that zoo.create_model knows."""
    seeds: Annotated[int, COUNT] = 3
    steps: Annotated[int, COUNT] = 2000
    batch: Annotated[int, BATCH] = 128
    rate: Annotated[float, POSITIVE] = 1e-3
    """Learning rate."""
    weight: Annotated[float, POSITIVE] = 20.0
    """Of each rule's loss, a mean over the trajectories; the driver's is a sum over them."""
    workers: Annotated[int | Literal["auto"], WORKERS] = "auto"
    """Processes that decode."""
    seconds: Annotated[float | None, POSITIVE] = None
    """Time for this call: a student that may not end in it is not begun; --resume goes on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Path = Path("runs/planning")
    resume: bool = False
    """Go on with the experiment in --out."""
    tiny: bool = False
    """Few scenes and steps: a test run."""
    dry_run: bool = False
    """Print what would run, and exit."""

    def __post_init__(self):
        check_ranges(self)


def full() -> PlanningExperiment:
    """Return the experiment in full."""
    return PlanningExperiment()


def tiny() -> PlanningExperiment:
    """Return the same experiment at its smallest."""
    return PlanningExperiment(
        scenes=48, held=8, size=32, student="test_resnet", seeds=1, steps=3, batch=8, tiny=True
    )
