"""A cut proves itself: a named axis is one, and a child is its masked parent.

Permuting the units of an axis in every tensor leaves a network's outputs alone. That proves the
table only if leaving one tensor out would have been seen, so each proof has a control.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from zoo.axes import Axis, Shapes, State
from zoo.students.prune.cut import keep_units
from zoo.students.prune.masked import is_norm, narrow, unsaved

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
        exact = {name: _exact(tensor) for name, tensor in state.items()}
        with full_precision(next(model.parameters()).device):
            return list(tensors(functional_call(model, exact, (), dict(inputs), tie_weights=False)))

    return forward


def _exact(tensor: Tensor) -> Tensor:
    """Return a tensor of 16 bits in float32: a proof compares small differences."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute products in the precision of their inputs: no autocast, no TF32."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def tensors(value: Any) -> Iterator[Tensor]:
    """Walk through the floating-point tensors of what a model returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


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
            raise ValueError(
                f"Axis {axis} is blind: nothing that reads it moves these outputs, so no cut of it "
                "can be proven. Give samples that reach it, or leave it whole."
            )
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
        x.index_select(dim, order.to(x.device))
        for dim in {1, x.ndim - 1}
        if x.ndim > dim and x.shape[dim] == len(order)
    ]
    return [x, *permuted]


# A child is its masked parent


class Cut(NamedTuple):
    """Units of one axis that stay; see `keep_units`."""

    axis: Axis
    kept: Tensor
    by: tuple[Axis, ...] = ()


def positions(shapes: Shapes, cuts: Sequence[Cut], like: State) -> State:
    """Return, for each tensor that cuts shorten, where its numbers stand in the full one.

    Returns:
        Flat indices, in the shape of the cut tensor.
    """
    cut_axes = {cut.axis for cut in cuts}
    names = {slot.param for axis in cut_axes for slot in shapes.slots(axis)} - shapes.tied.keys()
    places: State = {
        n: torch.arange(like[n].numel(), device=like[n].device).view(like[n].shape) for n in names
    }
    left = replace(shapes, tensors={n: shapes.tensors[n] for n in names}, tied={})
    for axis, kept, by in cuts:
        places, left = keep_units(left, places, axis, kept, by)
    return places


def masked(shapes: Shapes, state: State, places: State) -> State:
    """Return the full tensors with zeros for all that was cut."""
    out = dict(state)
    for name, place in places.items():
        flat, kept = state[name].flatten(), place.flatten()
        out[name] = torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(state[name])
    return out | {name: out[first] for name, first in shapes.tied.items()}


@contextmanager
def gathering_norms(model: nn.Module, places: State) -> Iterator[None]:
    """Let norms of a full-width model look at the kept units alone, as those of a child do."""
    patched = []
    for path, module in model.named_modules():
        place = places.get(f"{path}.weight")
        if is_norm(module) and place is not None and place.ndim == 1:
            module.forward = narrow(module, place)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


class ClosedExperts(TorchFunctionMode):
    """Routers of a full-width model give no token to experts that were cut."""

    def __init__(self, shapes: Shapes, state: State, cuts: Sequence[Cut]):
        super().__init__()
        self.routers = []
        for axis, kept, _ in cuts:
            closed = torch.ones(shapes.sizes[axis], dtype=torch.bool)
            closed[kept] = False
            for name, shape in shapes.tensors.items():
                if shape.dims[:1] == (((axis,),),) and len(shape.dims) == 2 and shape.read == 1:
                    self.routers.append((state[name], closed))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and self.routers:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            for router, closed in self.routers:  # by value: a router may copy to float32
                if weight.shape == router.shape and torch.equal(weight, router.to(weight.dtype)):
                    return out.masked_fill(closed.to(out.device), -torch.inf)
        return out


def is_experts(shapes: Shapes, axis: Axis) -> bool:
    """Tell whether the units of an axis are packed experts."""
    return any(
        shape.dims[:1] == (((axis,),),) and len(shape.dims) == 3 and shape.read == 2
        for shape in shapes.tensors.values()
    )


def prove_child(
    parent: nn.Module,
    child: nn.Module,
    shapes: Shapes,
    cuts: Sequence[Cut],
    inputs: Mapping[str, Any],
) -> Proof:
    """Check that a cut model computes what its parent does with the cut units at zero.

    Args:
        shapes: The parent's.

    Returns:
        How far the two are apart, and as control how far the cut moved the parent's outputs.

    Raises:
        ValueError: they differ by more than a thousandth of what the cut moved.
    """
    state = dict(parent.state_dict())
    places = positions(shapes, cuts, state)
    # What follows from the width alone, as the scale of an embedding, is as in the child.
    own, forward = unsaved(child), forward_of(parent, inputs)
    for name, table in unsaved(parent).items():
        if name in own and own[name].shape == table.shape:
            state[name] = own[name]
    before = forward(dict(parent.state_dict()))
    full = masked(shapes, state, places)
    experts = [cut for cut in cuts if is_experts(shapes, cut.axis)]
    for axis, kept, _ in experts:  # what a router adds before it chooses
        for name, shape in shapes.tensors.items():
            if shape.dims == (((axis,),),):
                closed = torch.full_like(full[name], -torch.inf)
                here = kept.to(closed.device)
                full[name] = closed.index_copy_(0, here, full[name][here])
    shared = {name: places[first] for name, first in shapes.tied.items() if first in places}
    with gathering_norms(parent, places | shared), ClosedExperts(shapes, full, experts):
        expected = forward(full)
    found = forward_of(child, inputs)(dict(child.state_dict()))
    moved = control = 0.0
    for whole, mask, small in zip(before, expected, found, strict=True):
        if mask.shape != small.shape:  # the output is what was cut, and zeros elsewhere
            mask = _without_zeros(mask, small)
        else:
            control = max(control, float((whole - mask).abs().max()))
        moved = max(moved, float((mask - small).abs().max()))
    control = control or max(float(x.abs().max()) for x in before)
    if not moved < LIMIT * control:
        raise ValueError(
            f"The cut model is not its masked parent: they differ by {moved:.1e}, and the cut "
            f"moved the outputs by {control:.1e}. Please report this with the model and the plan."
        )
    return Proof("child", moved, control)


def _without_zeros(mask: Tensor, small: Tensor) -> Tensor:
    for dim in range(mask.ndim):
        if mask.shape[dim] != small.shape[dim]:
            others = [i for i in range(mask.ndim) if i != dim]
            kept = mask.abs().amax(others).topk(small.shape[dim]).indices.sort().values
            mask = mask.index_select(dim, kept)
    return mask
