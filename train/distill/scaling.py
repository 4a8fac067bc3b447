"""A recipe on another number of GPUs: the images of each GPU stay, batch and rate grow.

A recipe is for a batch in as many slices as its paper had GPUs, so batch / slices are the images
of a GPU. The rate of AdamW grows with the square root of the batch (2205.10287), and the steps
shrink so that as many images are seen.
"""

import math
from dataclasses import replace

from zoo.train.distill.config import Distill


def scaled_to(config: Distill, gpus: int) -> Distill:
    """Return a run for as many GPUs, one slice each."""
    factor = gpus / config.num_slices
    every, steps = config.every, max(1, round(config.steps / factor))
    return replace(
        config,
        batch=config.batch // config.num_slices * gpus,
        batches=tuple(n * gpus // config.num_slices for n in config.batches),
        slices=gpus,
        steps=steps,
        every=replace(every, evaluate=max(1, round(every.evaluate / factor))),
        optim=replace(
            config.optim,
            lr=_short(config.optim.lr * math.sqrt(factor)),
            min_lr=_short(config.optim.min_lr * math.sqrt(factor)),
        ),
    )


def _short(rate: float) -> float:
    """Return a rate as it is spelled out in a command line."""
    return float(f"{rate:.6g}")


def shared_out(config: Distill, gpus: int) -> Distill:
    """Return a run of the batch that it has, in slices that as many GPUs can share.

    Raises:
        ValueError: the batch has no such slices.
    """
    if config.num_slices % gpus == 0:
        return config
    if config.batch % gpus:
        near = max(1, round(config.batch / gpus)) * gpus
        raise ValueError(
            f"A batch of {config.batch} does not split over {gpus} GPUs; {near} does, and without "
            "--batch it grows with the GPUs."
        )
    return replace(config, slices=gpus)


def changes(before: Distill, after: Distill) -> list[str]:
    """Return the options of `zoo distill` that make one of these runs the other."""
    words = []
    for name in ("batch", "batches", "slices", "steps"):
        if (value := getattr(after, name)) != getattr(before, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    for name in ("lr", "min_lr"):
        if (value := getattr(after.optim, name)) != getattr(before.optim, name):
            words += [f"--optim.{name.replace('_', '-')}", f"{value:.6g}"]
    for name in ("checkpoint", "evaluate"):
        if (value := getattr(after.every, name)) != getattr(before.every, name):
            words += [f"--every.{name}", str(value)]
    return words
