"""Batches of views, in the plan's order in training and in the files' order in evaluation."""

import os
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch.utils.data import DataLoader

from zoo.data.plan import Plan
from zoo.data.sources import Source
from zoo.data.unreadable import TRIES, Lost, note_lost, wrong_folder
from zoo.data.views import Centres, View, Views, collate
from zoo.features import Batch

NICENESS = 5
"""Of processes that read for a training: the one that trains, which they wait for, goes first."""


def yield_to_training(_: int) -> None:
    """Lower the priority of this process: what a worker begins with."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)


class PlanSampler:
    """Slices of (position, index) of the steps `start`..`steps`, in the plan's order."""

    def __init__(
        self,
        plan: Plan,
        start: int,
        steps: int,
        num_slices: int = 1,
        slices: Sequence[int] = (0,),
        cuts: Sequence[int] = (),
    ):
        self.plan, self.start, self.steps = plan, start, steps
        self.num_slices, self.slices, self.cuts = num_slices, slices, cuts

    def __len__(self) -> int:
        return (self.steps - self.start) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            positions = self.plan.positions(step).tolist()
            batch = list(zip(positions, self.plan.indices(step).tolist(), strict=True))
            cuts = self.cuts or [len(batch) // self.num_slices] * self.num_slices
            ends = [0, *accumulate(cuts)]
            for index in self.slices:
                yield batch[ends[index] : ends[index + 1]]


def train_batches(
    source: Source,
    view: View,
    plan: Plan,
    *,
    steps: int,
    start: int = 0,
    workers: int = 0,
    num_slices: int = 1,
    slices: Sequence[int] = (0,),
    cuts: Sequence[int] = (),
) -> Iterator[dict]:
    """Yield the batches of the steps from `start` up to `steps`, as the dicts of `collate`.

    The plan can be asked about any step, so a resumed run simply starts at a later one.

    Args:
        num_slices: Parts that each batch is cut into.
        slices: Indices of the parts that are loaded, in this order; each is yielded by itself.
        cuts: Samples of each part; by default they are equal.
    """
    yield from DataLoader(
        Views(source, view, plan),
        batch_sampler=PlanSampler(plan, start, steps, num_slices, slices, cuts),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=yield_to_training,
    )


def eval_batches(
    source: Source,
    size: int,
    batch: int,
    *,
    limit: int | None = None,
    workers: int = 0,
    pin: bool = False,
    unreadable: set[str] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yield the samples up to `limit` in order, as batches of centre crops.

    Unreadable images are left out, so a batch may be smaller.

    Args:
        size: Side of the crops in pixels.
        pin: Use pinned memory, which a GPU can copy from while it computes.
        unreadable: Takes the names of the images that are left out; each new one is logged.
        share: Which of how many shares; of the batches that all of them have, every so many-th.

    Raises:
        ValueError: no image can be read; of one share among several nothing follows.
    """
    known = set() if unreadable is None else unreadable
    first, every = share
    crops = centre_crops(source, size, batch, limit=limit, workers=workers, pin=pin, share=share)
    for number, part in enumerate(crops):
        note_lost(part["lost"], known)
        if part["keys"]:
            at = first + number * every
            yield Batch(part["images"], part["keys"], part["labels"], number=at)


def centre_crops(
    source: Source,
    size: int,
    batch: int,
    *,
    start: int = 0,
    limit: int | None = None,
    workers: int = 0,
    pin: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict]:
    """Yield the samples from `start` up to `limit` in order, as the dicts of `collate`.

    Raises:
        ValueError: no image can be read; of one share among several nothing follows.
    """
    count = len(source) if limit is None else min(limit, len(source))
    blocks = [range(first, min(first + batch, count)) for first in range(start, count, batch)]
    blocks = blocks[share[0] :: share[1]]
    loader = DataLoader(
        Centres(source, View(size=size)),
        batch_sampler=[list(block) for block in blocks],
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    lost: list[Lost] = []
    some = share[1] > 1
    for part, block in zip(loader, blocks, strict=True):
        some = some or bool(part["keys"])
        lost += [] if some else part["lost"]
        if not some and (len(lost) >= TRIES or block.stop == count):
            raise wrong_folder(lost)
        yield part
