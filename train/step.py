"""One module around everything that a step trains, so that DDP sees one forward pass."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zoo.train.mesh import same_on_all, world
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class Step(nn.Module):
    """A slice's losses and their weighted sum, as a function of everything that learns.

    Learned weights of losses are in it too: outside of the wrapped module DDP would leave each rank
    its own.
    """

    def __init__(self, task: Task, state: TrainState):
        super().__init__()
        self.model, self.parts = state.model, nn.ModuleList(state.parts.values())
        self._held = (task, state)  # in a tuple: `state` is no module, and a task need not be

    def forward(
        self, batch: Any, targets: Any, step: int, counts: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Loss], dict[str, Tensor]]:
        """Return the number to minimise, each loss, and each over the count of the whole batch."""
        task, state = self._held
        losses = task.losses(state, batch, targets, step)
        shares = {name: loss.total / counts[name] for name, loss in losses.items()}
        return task.weigh(shares, step), losses, shares


class Ranks:
    """`Step` on the ranks of a run: gradients are summed over them with each step's last slice."""

    def __init__(self, task: Task, state: TrainState):
        self.task, inner = task, Step(task, state)
        # DDP would begin with rank 0's weights, and hide that the others drew their own
        assert same_on_all(list(inner.parameters())), "the ranks begin with different weights"
        # buffers move by the mean over slices (`SliceBuffers`), not by rank 0's
        self.step: nn.Module = (
            DistributedDataParallel(inner, broadcast_buffers=False, gradient_as_bucket_view=True)
            if world() > 1
            else inner
        )

    def backward(self, total: Tensor) -> None:
        """Add a slice's gradients. DDP takes the mean over the ranks, and a loss is a sum."""
        (total * world() if world() > 1 else total).backward()

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        """Return the context of a slice; only behind the last one gradients are summed."""
        if last or not isinstance(self.step, DistributedDataParallel):
            return nullcontext()
        return self.step.no_sync()
