"""A cut proves itself: a named axis is one, and a child is its masked parent.

Permuting the units of an axis in every tensor leaves a network's outputs alone. That proves the
table only if leaving one tensor out would have been seen, so each proof has a control.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.axes import Axis, Shapes, State
from zoo.students.prune.cut import keep_units

LIMIT = 1e-3
"""A permutation may move outputs by this much of what its control moves them by."""


class Proof(NamedTuple):
    """What permuting an axis moved, in all its tensors and in all but one."""

    axis: Axis
    moved: float
    control: float


Forward = Callable[[State], list[Tensor]]


def forward_of(model: nn.Module, inputs: Mapping[str, Any]) -> Forward:
    """Return a function from a state dict to the model's outputs for these inputs."""

    @torch.no_grad()
    def forward(state: State) -> list[Tensor]:
        return list(_tensors(functional_call(model, state, (), dict(inputs), tie_weights=False)))

    return forward


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def prove(
    shapes: Shapes, state: State, forward: Forward, axes: list[Axis] | None = None
) -> list[Proof]:
    """Permute each axis, check that outputs stay, and that the check would have seen a wrong one.

    Args:
        axes: All whose units can change places, if None.

    Raises:
        ValueError: outputs moved, so the table is wrong for this model; or they cannot move, so
            these inputs do not show the axis.
    """
    before = forward(state)
    wanted = axes or [a for a, n in shapes.sizes.items() if n > 1 and a not in shapes.rigid]
    proofs = []
    for axis in wanted:
        proofs.append(prove_axis(shapes, state, forward, before, axis))
        _, moved, control = proofs[-1]
        if control == 0:
            raise ValueError(f"Axis {axis} is blind: nothing that reads it moves these outputs.")
        if not moved < LIMIT * control:
            raise ValueError(
                f"Axis {axis} is none: permuting it moves the outputs by {moved:.1e}, and by "
                f"{control:.1e} with one tensor left out. The table is wrong for this model."
            )
    return proofs


def prove_axis(
    shapes: Shapes, state: State, forward: Forward, before: list[Tensor], axis: Axis
) -> Proof:
    """Permute one axis in all its tensors, and in all but one of them (the one that shows most)."""
    order = torch.arange(shapes.sizes[axis]).roll(1)  # no unit stays, and none in its group
    permuted, _ = keep_units(shapes, state, axis, order)
    moved = _distance(before, forward(permuted), order)
    slots = [slot.param for slot in (*shapes.readers(axis), *shapes.slots(axis))]
    control = 0.0
    for name in [n for n in dict.fromkeys(slots) if n not in shapes.tied][:4]:
        again = [name, *(other for other, first in shapes.tied.items() if first == name)]
        broken = {**permuted, **{n: state[n] for n in again}}
        control = max(control, _distance(before, forward(broken), order))
        if moved < LIMIT * control:
            break
    return Proof(axis, moved, control)


def _distance(before: list[Tensor], after: list[Tensor], order: Tensor) -> float:
    """Return the largest difference; an output may be the permuted axis itself."""
    return max(
        min(float((same - b).abs().max()) for same in _either(a, order))
        for a, b in zip(before, after, strict=True)
    )


def _either(x: Tensor, order: Tensor) -> list[Tensor]:
    permuted = [
        x.index_select(dim, order)
        for dim in {1, x.ndim - 1}
        if x.ndim > dim and x.shape[dim] == len(order)
    ]
    return [x, *permuted]
