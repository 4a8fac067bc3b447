"""A run's language models over its ranks: stretches of rows, and shares of the experts.

A stretch of each row stands on a rank of a group (`sequence`), an expert on one of another
(`experts`); neither group need lie in the other (parallel folding, 2504.14960).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.language.expert_parallel import (
    Drops,
    check_experts,
    check_groups,
    folded_meshes,
    parallel_experts,
)
from zoo.language.moe import moe_layers
from zoo.language.token_parallel import TokenParallel, check_model
from zoo.language.tokens import ALL
from zoo.layers.sequence import Group, world

if TYPE_CHECKING:  # seconds to import, which no other run needs
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many ranks share what; of one process nothing is spread."""

    sequence: int = 1
    """Ranks that hold a row together."""
    experts: int = 1
    """Ranks over which a layer's experts are spread."""
    capacity: float | None = None
    """Room of an expert while a model is trained, in even shares; see `run_experts`."""

    def __bool__(self) -> bool:
        return (self.sequence, self.experts, self.capacity) != (1, 1, None)

    def check_ranks(self, total: int) -> None:
        """Refuse a number of ranks that these do not divide.

        Raises:
            ValueError: it is.
        """
        wanted = max(self.sequence, self.experts)
        if total == 1 < wanted:
            raise ValueError(
                f"--sequence {self.sequence} --experts {self.experts} needs {wanted} processes and "
                f"there is one: torchrun --nproc-per-node {wanted} -m zoo ..., or 1 for both."
            )
        check_groups(total, sequence=self.sequence, experts=self.experts)

    def check_student(self, model: Any, name: str) -> None:
        """Refuse a model that cannot be spread so.

        Raises:
            ValueError: it cannot.
        """
        layers = moe_layers(model)
        if (self.experts > 1 or self.capacity) and not layers:
            what = "--experts" if self.experts > 1 else "--capacity"
            raise ValueError(
                f"{name} is no mixture of experts, which {what} is for; leave it out, or make one "
                "of it first (zoo upcycle)."
            )
        for layer in layers.values():
            check_experts(layer.experts.num_experts, self.experts)  # pyright: ignore[reportArgumentType]
        if self.sequence > 1:
            check_model(model, self.sequence)


def stretch(length: int, num_ranks: int, rank: int) -> slice:
    """Return the columns of one of the ranks that hold a row; see `even_lengths`."""
    if num_ranks == 1:
        return ALL
    share, rest = divmod(length, num_ranks)
    begin = rank * share + min(rank, rest)
    return slice(begin, begin + share + (rank < rest))


@dataclass
class Spread:
    """Models over the ranks of a run."""

    sizes: Sizes
    sequence: Group
    experts: Group
    mesh: "DeviceMesh | None"
    """Copies of the experts by ranks of experts."""
    drops: Drops
    """Of the student."""

    @classmethod
    def over_ranks(cls, sizes: Sizes, device: str) -> "Spread":
        """Make the groups; every rank calls this.

        Args:
            device: Type of the device.

        Raises:
            ValueError: they do not divide the ranks.
        """
        if max(sizes.sequence, sizes.experts) == 1:
            return cls(sizes, None, None, None, Drops())
        meshes = folded_meshes(device, sequence=sizes.sequence, experts=sizes.experts)
        sequence = meshes.dense["cp"].get_group() if sizes.sequence > 1 else None
        if sizes.experts == 1:
            return cls(sizes, sequence, None, None, Drops())
        return cls(sizes, sequence, meshes.moe["ep"].get_group(), meshes.moe, Drops())

    def own(self, length: int) -> slice:
        """Return the columns of this rank, of rows of `length` tokens."""
        rank = 0 if self.sequence is None else self.sequence.rank()
        return stretch(length, world(self.sequence), rank)

    def place(self, model: Any) -> None:
        """Spread a student, or its average, in place.

        Raises:
            ValueError: it cannot be spread.
        """
        if moe_layers(model):
            capacity = self.sizes.capacity
            drops = parallel_experts(model, self.experts, capacity=capacity, mesh=self.mesh)
            if model.training:
                self.drops = drops
        if self.sequence is not None:
            TokenParallel(model, self.sequence)

    def place_teacher(self, model: Any) -> str:
        """Spread a frozen model, as far as it can be; say what cannot.

        Each rank reads whole rows with one that cannot be spread, and keeps its stretch.
        """
        reasons = []
        if moe_layers(model):
            try:
                parallel_experts(model, self.experts)
            except ValueError as error:
                reasons.append(f"all of its experts stand on each process: {error}")
        if self.sequence is not None:
            try:
                TokenParallel(model, self.sequence)
            except ValueError as error:
                reasons.append(f"each process reads whole rows with it: {error}")
        return "; ".join(reasons)

    def dropped(self, num_tokens: int) -> float:
        """Return how many tokens found no room in the student since this was last asked.

        The mean over its layers and the experts that a token wants; over ranks it adds up.

        Args:
            num_tokens: That this rank read since then.
        """
        dropped, pairs = self.drops.dropped / world(self.experts), self.drops.pairs
        self.drops.dropped = self.drops.pairs = 0
        return num_tokens * dropped / pairs
