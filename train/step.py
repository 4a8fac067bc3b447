"""One module around everything that a step trains, so that DDP and FSDP see one forward pass."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zoo.train.mesh import same_on_all, world
from zoo.train.shard import is_cut
from zoo.train.skew import StepClock
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class Ranks:
    """A slice's losses and their weighted sum, with gradients that are summed over the ranks."""

    def __init__(self, task: Task, state: TrainState):
        self.task, self.state = task, state
        self.learned: nn.Module = state.learned
        self.clock = StepClock(state.device) if world() > 1 else None
        cut = [name for name, p in state.learned.named_parameters() if is_cut(p)]
        plain = [p for p in state.learned.parameters() if not is_cut(p)]
        if world() > 1 and plain:
            # DDP would begin with rank 0's weights, and hide that the others drew their own
            assert same_on_all(plain), "the ranks begin differently"
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(state.learned, cut)
            # buffers move by the mean over slices (`SliceBuffers`), not by rank 0's
            self.learned = DistributedDataParallel(
                state.learned, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def step(
        self, batch: Any, targets: Any, step: int, counts: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Loss], dict[str, Tensor]]:
        """Return the number to minimise, each loss, and each over the count of the whole batch."""

        def run() -> tuple[Tensor, dict[str, Loss], dict[str, Tensor]]:
            losses = self.task.losses(self.state, batch, targets, step)
            shares = {name: loss.total / counts[name] for name, loss in losses.items()}
            return self.task.weigh(shares, step), losses, shares

        return self.learned(run)

    def backward(self, total: Tensor) -> None:
        """Add a slice's gradients. DDP and FSDP take the mean over the ranks; a loss is a sum."""
        (total * world() if world() > 1 else total).backward()

    def add_copies(self) -> None:
        """Add up, behind the last slice, gradients of cut weights that other ranks have copies of.

        FSDP has done so with its own; those of experts are placed as partial until here.
        """
        cut: list[Any] = [p for p in self.learned.parameters() if is_cut(p) and p.grad is not None]
        for p in cut:
            if p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements) / world()

    def accumulating(self, *, last: bool) -> AbstractContextManager:
        """Return the context of a slice; with DDP only behind the last one gradients are summed.

        FSDP sums behind each: the whole gradients would need the memory that it is to save.
        """
        if last or not isinstance(self.learned, DistributedDataParallel):
            return nullcontext()
        return self.learned.no_sync()
