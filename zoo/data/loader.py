"""Batches of views, in the plan's order in training and in the files' order in evaluation."""

import warnings
from collections.abc import Iterator

import torch

from zoo.data.plan import Plan
from zoo.data.sources import Source, _log
from zoo.data.views import View, Views, collate
from zoo.features import Batch


class PlanSampler:
    """Batches of (position, index) of the steps `start`..`steps`, in the plan's order."""

    def __init__(self, plan: Plan, start: int, steps: int):
        self.plan, self.start, self.steps = plan, start, steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            places = self.plan.positions(step).tolist()
            yield list(zip(places, self.plan.indices(step).tolist(), strict=True))


def train_batches(
    source: Source, view: View, plan: Plan, *, steps: int, start: int = 0, workers: int = 0
) -> Iterator[dict]:
    """Load the batches of steps `start`..`steps` of `plan`; yields dicts of `collate`.

    The plan answers for any step, so a loader that resumes simply begins at a later one.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler = PlanSampler(plan, start, steps)
    with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.15 deprecates
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        loader = StatefulDataLoader(
            Views(source, view, plan),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
        yield from loader


def eval_batches(
    source: Source,
    size: int,
    batch: int,
    *,
    start: int = 0,
    limit: int | None = None,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Return the samples from `start` to `limit` in order, centre crops, as batches.

    Args:
        pin: Put them where a GPU can fetch them while it computes.
    """
    from torch.utils.data import DataLoader

    count = len(source) if limit is None else min(limit, len(source))
    blocks = [
        [(i, i) for i in range(first, min(first + batch, count))]
        for first in range(start, count, batch)
    ]
    loader = DataLoader(
        Views(source, View(size=size), None),
        batch_sampler=blocks,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    for part in loader:
        for name in part["skipped"]:
            _log.warning("an unreadable image was replaced in the evaluation: %s", name)
        yield Batch(part["images"], part["keys"], part["labels"])
