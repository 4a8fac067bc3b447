"""Experts over ranks: each rank holds some experts of every layer, and tokens travel to them.

The ranks of experts need not be those of a sequence or of data (parallel folding, 2504.14960): the
same ranks are cut once for attention, (data, sequence), and once for experts, (copies, experts).

Gradients are those of the sum of all ranks' losses, as in `zoo.layers.sequence`. Those of experts
hold a group's tokens on the rank that has the expert, and are to be added up over the copies; those
of all other weights over all ranks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.language.moe import Routing, moe_layers
from zoo.layers.sequence import Group, exchange, world

if TYPE_CHECKING:  # seconds to import, which no other run needs
    from torch.distributed.device_mesh import DeviceMesh


class Meshes(NamedTuple):
    dense: "DeviceMesh"
    """dp by cp: copies of the data's shares, stretches of a sequence."""
    moe: "DeviceMesh"
    """edp by ep: copies of the experts, shares of them."""


def folded_meshes(device: str, *, sequence: int = 1, experts: int = 1) -> Meshes:
    """Cut the ranks twice: for attention, and for experts, neither inside the other.

    Args:
        device: Type of the device.
        sequence: Ranks that hold a sequence together.
        experts: Ranks that hold the experts together.

    Raises:
        ValueError: one of them does not divide the number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    total = dist.get_world_size()
    check_groups(total, sequence=sequence, experts=experts)
    return Meshes(
        init_device_mesh(device, (total // sequence, sequence), mesh_dim_names=("dp", "cp")),
        init_device_mesh(device, (total // experts, experts), mesh_dim_names=("edp", "ep")),
    )


def check_groups(total: int, **sizes: int) -> None:
    """Refuse groups of ranks that do not divide their number, by their names.

    Raises:
        ValueError: they do not.
    """
    for name, size in sizes.items():
        if size < 1 or total % size:
            fits = [n for n in range(1, total + 1) if total % n == 0]
            near = min(fits, key=lambda n: abs(n - size))
            raise ValueError(
                f"{total} ranks do not split into groups of {size} for the {name}; the nearest "
                f"size is {near}."
            )


Apply = Callable[[Float[Tensor, "m C"], Int[Tensor, " m"]], Float[Tensor, "m C"]]
"""Run each row through one of this rank's own experts, numbered from 0."""


class Mixed(NamedTuple):
    out: Float[Tensor, "n C"]
    dropped: int
    """Pairs of a token and an expert, over the group, for which the expert had no room."""


def run_experts(
    x: Float[Tensor, "n C"],
    routing: Routing,
    apply: Apply,
    num_experts: int,
    group: Group,
    *,
    capacity: float | None = None,
) -> Mixed:
    """Send tokens to the ranks of their experts, run those, and add up what comes back.

    Transfers are uneven and nothing is padded: a rank may have no tokens, or its experts may get
    none. An expert with room for `capacity` times its even share takes the first tokens in the
    order of ranks and rows, as one process with all of them would; a token for which an expert has
    no room gets nothing from it, and its other weights stay as they are (2101.03961).

    Args:
        apply: This rank's experts, the first N / W on rank 0. Where no token comes it gets no
            rows; what it returns must hang on them, so that this rank takes part in the way back.
        capacity: None for as much room as it takes: nothing is dropped.

    Raises:
        ValueError: the ranks do not divide the experts, or `capacity` is not above 0.
    """
    own = check_experts(num_experts, world(group))
    order, kept, counts, dropped = _plan(routing.experts, num_experts, group, capacity)
    order = order[kept]
    rows, rank = order // routing.experts.shape[1], 0 if group is None else dist.get_rank(group)
    per_rank = counts.unflatten(1, (-1, own)).sum(2).tolist()  # [source, target]
    shape = x.shape[1:]
    sent = [[part] for part in x[rows].split(per_rank[rank])]
    arriving = [source[rank] for source in per_rank]
    received = exchange(sent, [[(n, *shape)] for n in arriving], group)
    mine = torch.arange(own, device=x.device).repeat(len(per_rank))
    numbers = mine.repeat_interleave(counts[:, rank * own : (rank + 1) * own].flatten())
    inputs = torch.cat([part for [part] in received])
    outputs = apply(inputs, numbers).to(inputs.dtype)  # autocast's, where there are rows
    back = exchange(
        [[part] for part in outputs.split(arriving)], [[(n, *shape)] for n in per_rank[rank]], group
    )
    weights = routing.weights.flatten()[order, None].to(x.dtype)
    parts = torch.cat([part for [part] in back]) * weights
    return Mixed(torch.zeros_like(x).index_add(0, rows, parts), dropped)


def check_experts(num_experts: int, ranks: int) -> int:
    """Return how many experts each of some ranks has.

    Raises:
        ValueError: the ranks do not divide them.
    """
    if num_experts % ranks:
        fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        near = min(fits, key=lambda n: abs(n - ranks))
        raise ValueError(
            f"{num_experts} experts do not split over {ranks} ranks; the nearest number is {near}."
        )
    return num_experts // ranks


class _Plan(NamedTuple):
    order: Int[Tensor, " pairs"]
    """This rank's pairs by expert, and as they came for each."""
    kept: Tensor
    """Which of them have room."""
    counts: Int[Tensor, "W E"]
    """How many pairs each rank sends to each expert."""
    dropped: int


def _plan(experts: Tensor, num_experts: int, group: Group, capacity: float | None) -> _Plan:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    mine = torch.bincount(flat, minlength=num_experts)
    counts = mine[None]
    if group is not None:
        counts = torch.empty(world(group), num_experts, dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(counts.flatten(), mine, group=group)
    if capacity is None:
        return _Plan(order, torch.ones_like(order, dtype=torch.bool), counts, 0)
    if not capacity > 0:
        raise ValueError(f"The capacity is {capacity:g}; it is above 0, and 1 is an even share.")
    total = int(counts.sum())
    room = math.ceil(capacity * total / num_experts)
    before = counts.cumsum(0) - counts  # what ranks before this one send to each expert
    rank = 0 if group is None else dist.get_rank(group)
    first = mine.cumsum(0) - mine
    place = torch.arange(len(flat), device=flat.device) - first[flat[order]]
    kept = place + before[rank, flat[order]] < room
    counts = torch.minimum(counts, (room - before).clamp(min=0))
    return _Plan(order, kept, counts, total - int(counts.sum()))


# Models of transformers


@dataclass
class Drops:
    """How many pairs of a token and an expert had no room, over all layers and passes."""

    dropped: int = 0
    """Over the group."""
    pairs: int = 0
    """Of this rank's tokens."""


def parallel_experts(
    model: nn.Module,
    group: Group,
    *,
    capacity: float | None = None,
    mesh: "DeviceMesh | None" = None,
) -> Drops:
    """Leave each rank its own experts of a model of transformers, in place.

    The packed experts' parameters keep their names, and have N / W rows.

    Args:
        capacity: See `run_experts`; while the model is trained, for in evaluation nothing is
            dropped.
        mesh: That of `Meshes.moe`: parameters become DTensors of all experts, cut over `ep` and
            copied over `edp`. So are their gradients, which are sums of a rank's own tokens until
            they are added up over the copies (placed as partial).

    Returns:
        The count of what is dropped, which goes on while the model runs.

    Raises:
        ValueError: the model has no experts, or the ranks do not divide them.
    """
    layers, drops = moe_layers(model), Drops()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no mixture of experts to spread over ranks.")
    rank = 0 if group is None else dist.get_rank(group)
    for layer in layers.values():
        experts: Any = layer.experts
        total = experts.num_experts
        own = check_experts(total, world(group))
        for name, packed in list(experts.named_parameters(recurse=False)):
            part = packed.detach()[rank * own : (rank + 1) * own].clone()
            part = part if mesh is None else _cut(part, mesh)
            setattr(experts, name, nn.Parameter(part, requires_grad=packed.requires_grad))
        experts.num_experts = own
        whole = type(experts).forward
        experts.forward = partial(_forward, experts, whole, total, group, capacity, drops)
    return drops


def _cut(part: Tensor, mesh: "DeviceMesh") -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return DTensor.from_local(part, mesh, (Replicate(), Shard(0)), run_check=False)


def _own(x: Any) -> Any:
    """Return what this rank holds of a parameter; its gradient is that of this rank's tokens."""
    if not hasattr(x, "to_local"):
        return x
    from torch.distributed.tensor import Partial, Shard

    return x.to_local(grad_placements=(Partial(), Shard(0)))


class _OwnExperts:
    """Packed experts as their class's forward sees them, with what this rank holds of each."""

    def __init__(self, experts: nn.Module):
        self.experts = experts

    def __getattr__(self, name: str) -> Any:
        return _own(getattr(self.experts, name))


def _forward(
    experts: nn.Module,
    whole: Callable[..., Tensor],
    num_experts: int,
    group: Group,
    capacity: float | None,
    drops: Drops,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    """Stand in for the forward of packed experts."""

    def apply(rows: Tensor, numbers: Tensor) -> Tensor:
        if not len(rows):  # transformers' own have no gradients then; empty sums do, of zeros
            empty = [_own(p).flatten()[:0].sum() for p in experts.parameters()]
            return rows + torch.stack(empty).sum()
        return whole(_OwnExperts(experts), rows, numbers[:, None], rows.new_ones(len(rows), 1))

    room = capacity if experts.training else None
    mixed = run_experts(x, Routing(weights, chosen), apply, num_experts, group, capacity=room)
    drops.dropped += mixed.dropped
    drops.pairs += chosen.numel()
    return mixed.out


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the packed experts' parameters, which differ between the ranks of a group."""
    for name, layer in moe_layers(model).items():
        for key, parameter in layer.experts.named_parameters():
            yield f"{name}.experts.{key}", parameter
