"""The batches of a training run, on the device and in the order of a plan."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from zoo.data.loader import train_batches
from zoo.data.mixture import MixedPlan, Mixture
from zoo.data.plan import Plan
from zoo.data.sources import Source
from zoo.data.stream import StreamPlan, StreamSource
from zoo.data.views import View
from zoo.features import Batch


def plan_of(
    source: Source, batch: int, seed: int, views: int = 0, batches: tuple[int, ...] = ()
) -> Plan:
    """Return the plan of a run over a source; see `Plan` for the arguments."""
    if isinstance(source, StreamSource):
        return StreamPlan(len(source), batch, seed, batches=batches, block=source.block)
    if isinstance(source, Mixture):
        shares = source.weighted.shares
        return MixedPlan(len(source), batch, seed, views, batches, source.lengths, shares)
    return Plan(len(source), batch, seed, views, batches)


class PlanFeed:
    """What feeds of one plan share; each says how its batches are made."""

    source: Any
    """Knows the samples by `key(index)`."""
    plan: Plan
    slices: Sequence[int] = (0,)
    counted: Mapping[str, int] = MappingProxyType({})
    """Samples of a batch by the name of a loss, for losses that count some of them alone."""
    _skipped: Sequence[str] = ()

    def counts(self, step: int) -> Mapping[str, int]:
        """Return the samples of a batch that a loss counts: all, or as `counted` says."""
        return defaultdict(lambda: self.plan.count(step), self.counted)

    def keys(self, step: int) -> list[str]:
        """Name the samples of a step."""
        return [self.source.key(index) for index in self.plan.indices(step)]

    def skipped(self) -> Sequence[str]:
        """Name the samples that could not be read since this was last asked."""
        names, self._skipped = self._skipped, ()
        return names


@dataclass
class ImageFeed(PlanFeed):
    """Views of a source's images in the order of a plan.

    Args:
        slices: The slices of each batch that are taken, in this order; by default all of them.
        cuts: Images of each slice; by default slices are equal.
        counted: Images of a batch by the name of a loss, for losses that count some of them alone.
    """

    source: Source
    view: View
    plan: Plan
    device: torch.device
    num_slices: int = 1
    slices: Sequence[int] = ()
    workers: int = 0
    cuts: Sequence[int] = ()
    counted: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.slices = tuple(self.slices) or tuple(range(self.num_slices))

    def batches(self, start: int, steps: int) -> Iterator[Batch]:
        """Return the slices of the steps `start`..`steps`, one after another."""
        parts = train_batches(
            self.source,
            self.view,
            self.plan,
            steps=steps,
            start=start,
            workers=self.workers,
            num_slices=self.num_slices,
            slices=self.slices,
            cuts=self.cuts,
        )
        for part in parts:
            self._skipped = (*self._skipped, *part["skipped"])
            labels = part["labels"]
            batch = Batch(part["images"], part["keys"], labels, positions=part["positions"])
            yield batch.to(self.device)
