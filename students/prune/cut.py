"""Cut, permute and double the units of an axis, in all tensors where it stands.

State dicts are those of the model in memory: a file may name or pack its tensors otherwise.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from zoo.axes import Axis, Part, Shape, Shapes, State, part_size


def keep_units(
    shapes: Shapes,
    state: State,
    axis: Axis,
    kept: Int[Tensor, "*by units"],
    by: tuple[Axis, ...] = (),
) -> tuple[State, Shapes]:
    """Keep units of an axis, in this order: fewer cut it, as many permute it, repeated ones double.

    Tensors without the axis are shared with `state`; tied ones stay one.

    Args:
        kept: Indices of units; with `by` their own for each unit of the outer axes.
        by: Outer axes that the choice depends on: [g, s'] for states chosen in each group. All
            get the same number, by construction.

    Raises:
        ValueError: there is no such axis, it may not be chosen from, or an index is out of range;
            or a tensor has the axis without the axes that the choice depends on.
    """
    _check(shapes, axis, kept, by)
    out = dict(state)
    for name in {slot.param: None for slot in shapes.slots(axis)}:
        if name not in shapes.tied:
            out[name] = _take(name, state[name], shapes, axis, kept, by)
    out |= {n: out[first] for n, first in shapes.tied.items() if out[first] is not state[first]}
    return out, replace(shapes, sizes={**shapes.sizes, axis: kept.shape[-1]})


def keep_layers(shapes: Shapes, state: State, path: str, kept: list[int]) -> State:
    """Keep layers of the list `path` (`model.layers`), in this order, under new numbers.

    Raises:
        ValueError: no tensor lies in such a list, or it has no such layer.
    """
    prefix = path + "." if path else ""
    numbers = {
        int(word)
        for name in state
        if name.startswith(prefix) and (word := name[len(prefix) :].partition(".")[0]).isdigit()
    }
    if not numbers or not kept or not set(kept) <= numbers:
        known = ", ".join(layers.path for layers in shapes.layers)
        raise ValueError(
            f"Layers {kept} of {path!r} cannot be kept: it has {sorted(numbers)}. Lists of layers "
            f"here: {known}."
        )
    out = {}
    for name, tensor in state.items():
        word, _, rest = name[len(prefix) :].partition(".")
        if not (name.startswith(prefix) and word.isdigit()):
            out[name] = tensor
        elif int(word) in kept:
            out[f"{prefix}{kept.index(int(word))}.{rest}"] = tensor
    return out


def _check(shapes: Shapes, axis: Axis, kept: Tensor, by: tuple[Axis, ...]) -> None:
    if axis not in shapes.sizes:
        raise ValueError(f"There is no axis {axis!r}; there are {', '.join(shapes.sizes)}.")
    size = shapes.sizes[axis]
    if not kept.numel() or int(kept.min()) < 0 or int(kept.max()) >= size:
        raise ValueError(f"Axis {axis} has units 0 to {size - 1}; these are not: {kept.tolist()}.")
    outer = tuple(shapes.sizes[name] for name in by)
    if tuple(kept.shape[:-1]) != outer:
        raise ValueError(
            f"Units of {axis} chosen by {', '.join(by) or 'nothing'} have the shape "
            f"{[*outer, 'units']}, not {list(kept.shape)}."
        )


def _lengths(part: Part, shapes: Shapes) -> list[int]:
    return [part_size((unit,), shapes.sizes) for unit in part]


def _take(
    name: str, tensor: Tensor, shapes: Shapes, axis: Axis, kept: Tensor, by: tuple[Axis, ...]
) -> Tensor:
    """Take the kept units in every dim of one tensor."""
    shape = shapes.tensors[name]
    sizes = dict(shapes.sizes)
    for dim, parts in enumerate(shape.dims):
        if not any(axis in part for part in parts):
            continue
        pieces = tensor.split([part_size(part, sizes) for part in parts], dim)
        cut = [
            _take_in(name, piece, shape, shapes, dim, part, axis, kept, by)
            if axis in part
            else piece
            for piece, part in zip(pieces, parts, strict=True)
        ]
        tensor = torch.cat(cut, dim) if len(cut) > 1 else cut[0]
    return tensor.contiguous()


def _take_in(
    name: str,
    piece: Tensor,
    shape: Shape,
    shapes: Shapes,
    dim: int,
    part: Part,
    axis: Axis,
    kept: Tensor,
    by: tuple[Axis, ...],
) -> Tensor:
    """Take the kept units within one stacked part, `piece`, of one dim."""
    names: list[Axis | int] = []
    lengths: list[int] = []
    for i, parts in enumerate(shape.dims):
        inner = part if i == dim else parts[0]
        split = i == dim or (by and len(parts) == 1 and axis not in inner)
        names += inner if split else [-1]
        lengths += _lengths(inner, shapes) if split else [piece.shape[i]]
    if missing := [outer for outer in by if outer not in names]:
        raise ValueError(
            f"{name} ({shape}) has {axis} but not {', '.join(missing)}: units of {axis} cannot be "
            "chosen for each of them."
        )
    place = names.index(axis)
    index = kept.to(piece.device)
    order = sorted(range(len(by)), key=lambda i: names.index(by[i]))
    index = index.permute(*order, len(by))
    view = [
        kept.shape[-1] if i == place else length if unit in by else 1
        for i, (unit, length) in enumerate(zip(names, lengths, strict=True))
    ]
    if any(names.index(outer) > place for outer in by):
        raise ValueError(f"{name} ({shape}): {', '.join(by)} must stand before {axis}.")
    index = index.reshape(view)
    whole = [n if i != place else kept.shape[-1] for i, n in enumerate(lengths)]
    taken = piece.reshape(lengths).gather(place, index.expand(whole))
    out = list(piece.shape)
    out[dim] = math.prod(
        kept.shape[-1] if unit == axis else n
        for unit, n in zip(part, _lengths(part, shapes), strict=True)
    )
    return taken.reshape(out)
