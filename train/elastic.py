"""Nested training: each slice of a batch trains one size of a model whose units are sorted.

Flextron (2406.10260) and Nemotron Elastic (2511.16664): one set of weights, of which every size is
a prefix, learns from the frozen whole.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from zoo.data.plan import mix
from zoo.students.prune.masked import Masked, Size
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

SIZE = 8
"""Salt of `mix` for the size of a slice."""


class ElasticTask(Task):
    """Another task's losses, at a size that is drawn for each slice.

    Args:
        inner: What is learnt: a teacher's next tokens, teachers' features.
        masked: The model that learns.
        sizes: By name.
        shares: How often each is drawn, in any unit; equally often if there are none.
    """

    def __init__(
        self,
        inner: Task,
        masked: Masked,
        sizes: Mapping[str, Size],
        *,
        shares: Sequence[float] = (),
        seed: int = 0,
    ):
        self.inner, self.masked, self.sizes, self.seed = inner, masked, sizes, seed
        self.ends = list(accumulate(shares or [1.0] * len(sizes)))

    def drawn(self, position: int) -> str:
        """Draw the size of the slice whose first sample is at `position` of the stream."""
        share = mix(self.seed, SIZE, position) / 2**63 * self.ends[-1]
        return list(self.sizes)[bisect_right(self.ends, share)]

    def targets(self, batch: Any, step: int) -> Any:
        return self.inner.targets(batch, step)

    def losses(self, state: TrainState, batch: Any, targets: Any, step: int) -> dict[str, Loss]:
        return self.at(self.sizes[self.drawn(batch.positions[0])], state, batch, targets, step)

    def at(
        self, size: Size, state: TrainState, batch: Any, targets: Any, step: int
    ) -> dict[str, Loss]:
        """Return the losses of one size."""
        with self.masked.at(size):
            losses = self.inner.losses(state, batch, targets, step)
        # Layers that were left out get a gradient of 0, so that every slice has the same graph.
        rest = [p.flatten()[0] for p in self.masked.skipped(size.layers) if p.requires_grad]
        if rest:
            nothing = 0 * torch.stack(rest).sum()
            losses = {n: Loss(loss.total + nothing, loss.count) for n, loss in losses.items()}
        return losses

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        return self.inner.weigh(losses, step)

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        self.inner.observe(means, step)
