"""`zoo plan`: what its command line says, read without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.commands.cluster.words import read_stages, read_words
from zoo.train.ranges import COUNT, check_ranges


@dataclass(frozen=True, kw_only=True)
class ClusterPlanArgs:
    gpus: Annotated[tuple[int, ...], COUNT] = (8, 64, 512, 2048)
    """A column for each of these numbers of GPUs."""
    gpu: Literal["h200", "h100", "a100"] = "h200"
    links: Path | None = None
    """Links as `torchrun ... -m zoo bench links --out FILE` measured them; else assumed
    ones."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Estimate a recipe on many GPUs: speed, memory, traffic, failures, GPU-hours.

    Example: zoo plan c_radio_v4 --gpus 8 64 512 2048 --gpu h200

    Everything else on the line is as `zoo distill` takes it (--ranks fsdp, --compile-teachers).
    Without --batch, batch and rate grow with the GPUs, from the images for a GPU that the recipe
    states. Models are built without weights; nothing is downloaded, and no GPU is needed.
    """
    args, words = read_words(ClusterPlanArgs, argv, "plan", main.__doc__ or "")
    stages = read_stages(words, "plan")
    from zoo.commands.cluster.plan import print_cluster_plan

    print_cluster_plan(stages, words, args.gpus, args.gpu, args.links)
