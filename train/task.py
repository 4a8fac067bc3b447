"""What the training loop asks of a task, and of what feeds it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from zoo.train.state import TrainState


@dataclass(frozen=True)
class Loss:
    """A loss as a sum, so that slices of a batch, and ranks, add up.

    The loop divides by the count over the whole batch (`Feed.counts`), not by this one.
    """

    total: Tensor
    """The sum over what was counted: a scalar, or one value for each sample of the slice, [B]."""
    count: int
    """What was counted in this slice: images, valid tokens, boxes; 0 if it was left out of this
    step, whose log then has no value for it."""

    @classmethod
    def of_mean(cls, mean: Tensor, count: int) -> "Loss":
        """Make one of a mean over `count` samples, as libraries give it."""
        return cls(mean * count, count)


class Task(Protocol):
    """One way to train: distillation, detection, a classifier, ...

    A class that inherits from this one gets what is written here where it says nothing itself.
    `docs/tasks.md` has an example in sixty lines.
    """

    def targets(self, batch: Any, step: int) -> Any:
        """Compute what nothing trains: it may run a batch ahead, on a stream of its own."""
        return None

    def losses(self, state: "TrainState", batch: Any, targets: Any, step: int) -> dict[str, Loss]:
        """Run the model on a slice of a batch; the same names in the same order at every step."""
        ...

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        """Make one number of many: those of a slice, each over the count of the whole batch."""
        return sum(losses.values(), start=next(iter(losses.values())).new_zeros(()))

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        """See the losses of the whole batch, once a step, after the last backward pass."""


class Feed(Protocol):
    """Where the batches of a run come from: a pure function of the step, so that runs resume."""

    @property
    def slices(self) -> Sequence[int]:
        """The slices of each batch that this process takes, in the order in which it does."""
        ...

    def batches(self, start: int, steps: int) -> Iterator[Any]:
        """Return the slices of the steps `start`..`steps`, one after another, on the device."""
        ...

    def counts(self, step: int) -> Mapping[str, int]:
        """Return what each loss is divided by: its count over all slices of the batch."""
        ...

    def keys(self, step: int) -> list[str]:
        """Name the samples of a step, for error messages."""
        ...

    def skipped(self) -> Iterable[str]:
        """Name the samples that could not be read since this was last asked."""
        ...
