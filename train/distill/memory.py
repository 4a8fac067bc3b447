"""What a step and the calibration hold at least, against the memory that there is."""

from collections.abc import Mapping

import torch

from zoo.teachers.teacher import Teacher
from zoo.train.device import memory_of
from zoo.train.distill.config import Distill

COPIES = 4
"""Of the weights in training: themselves, their gradient, and AdamW's two moments."""


def check_memory(
    config: Distill, device: torch.device, teachers: Mapping[str, Teacher] | None = None
) -> None:
    """Refuse what cannot fit: a lower bound is held against all the memory of the machine.

    Counted are a slice's images and targets, the summaries of the calibration, and the hidden
    layers of the heads; not counted is what networks hold between their layers. Before the teachers
    are open, their shares are left out.

    Raises:
        ValueError: the bound is above the memory; both are said.
    """
    opened = (teachers or {}).values()
    slice_size = config.batch // config.num_slices
    grids = [(t.grid or (0, 0), t.spatial_dim or 0, t.summary_dim or 0) for t in opened]
    targets = sum(4 * (rows * cols * width + summary) for (rows, cols), width, summary in grids)
    side = max((config.size, *config.sizes))
    hidden = config.heads.hidden or max((max(width, n) for _, width, n in grids), default=0)
    heads = 4 * COPIES * len(config.teachers) * config.heads.num_inner * hidden**2
    summaries = 4 * config.batch * config.calibration * sum(n for _, _, n in grids)
    for needed, what, where, way in (
        (
            slice_size * (3 * side**2 + targets),
            f"A slice of {slice_size:,} images" + " and their targets" * bool(targets),
            device,
            "Give a smaller --batch, or more --slices.",
        ),
        (
            heads,
            f"Training {config.heads.num_inner} hidden layers of {hidden:,} in each head",
            device,
            "Give smaller --heads.hidden or --heads.num-inner.",
        ),
        (
            summaries,
            f"The summaries of {config.calibration:,} batches of calibration",
            torch.device("cpu"),
            "Give a smaller --calibration.",
        ),
    ):
        if needed > (there := memory_of(where)):
            raise ValueError(
                f"{what}: at least {needed / 1e9:,.1f} GB, and this {where.type} has "
                f"{there / 1e9:,.1f} GB. {way}"
            )
