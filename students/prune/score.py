"""How much each unit of each axis matters: its activation where it is read, or its weights alone.

Whoever multiplies by a weight whose columns run along an axis sees that axis's activations. A mode
that looks at every product knows those weights by their storage, so layers that pass a bare weight,
or one expert's view of a packed one, are seen too.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.axes import Axis, Shapes, State, part_size

CONVS = {torch.conv1d: 1, torch.conv2d: 1, torch.conv3d: 1}
"""Products whose input has its channels in dim 1; a linear layer has them last."""


class Watched(NamedTuple):
    """A weight that is looked for, and how its columns stand."""

    name: str
    column: int
    """Dim of the weight that is summed over."""


Inputs = Mapping[str, Any]


class Taps(TorchFunctionMode):
    """Collect, for each watched weight, the mean over tokens of |input|, squared over samples."""

    def __init__(self, model: nn.Module, names: Mapping[str, int]):
        super().__init__()
        state = model.state_dict(keep_vars=True)
        self.watched = {
            state[name].untyped_storage()._cdata: Watched(name, column)
            for name, column in names.items()
        }
        self.shapes = {name: tuple(state[name].shape) for name in names}
        self.strides = {name: state[name].stride(0) for name in names}
        self.squares: dict[str, Tensor] = {}
        self.batch = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func in CONVS:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            weight = given["weight"]
            found = self.watched.get(weight.untyped_storage()._cdata)
            if found is not None:
                x = given["input"]
                self._add(found.name, x.movedim(1, -1) if func in CONVS else x, weight)
        return func(*args, **kwargs)

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, weight: Tensor) -> None:
        width = x.shape[-1]
        if weight.ndim < len(self.shapes[name]):  # one expert of a packed weight: routed tokens
            expert = weight.storage_offset() // self.strides[name]
            sums = x.reshape(-1, width).abs().sum(0, dtype=torch.float64)
            into = self._sums(name, (self.shapes[name][0], width), x.device)
            into[expert] += sums
            self._sums(f"{name} tokens", (self.shapes[name][0], 1), x.device)[expert] += len(
                x.reshape(-1, width)
            )
            return
        # Windows, flattened tokens and pooled heads fold back: the sample is the slowest dim. A
        # table that all samples share (positions) counts for each of them.
        table = x.shape[0] % self.batch
        x = x.reshape(1 if table else self.batch, -1, width)
        means = x.abs().mean(1, dtype=torch.promote_types(x.dtype, torch.float32)).double()
        squares = (means**2).sum(0) * (self.batch if table else 1)
        self._sums(name, (width,), x.device).add_(squares)

    def _sums(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if name not in self.squares:
            self.squares[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        return self.squares[name]

    def scores(self) -> dict[str, Tensor]:
        """Return each weight's score of its columns, [columns].

        Of a packed weight [experts, columns], and under `NAME tokens` how many tokens each expert
        got, [experts, 1].
        """
        return {
            name: sums
            if name.endswith(" tokens")
            else sums / self.squares[f"{name} tokens"].clamp(min=1)
            if f"{name} tokens" in self.squares
            else sums.sqrt()
            for name, sums in self.squares.items()
        }


def activation(
    model: nn.Module, shapes: Shapes, batches: Iterable[Inputs], axes: Iterable[Axis]
) -> dict[str, Tensor]:
    """Run the model and score the columns of all weights that read these axes, on its device.

    Minitron (2407.14679), its best aggregation: the L2 norm over samples of the mean over tokens
    of the absolute activation. Equal however the samples are cut into batches.

    Raises:
        ValueError: there are no batches, or nothing read one of the axes.
    """
    readers = {s.param: s.dim for axis in axes for s in shapes.readers(axis)}
    for name in {s.param for axis in axes for s in shapes.slots(axis)}:
        shape = shapes.tensors[name]
        if shape.read is not None and len(shape.dims) == 3 and shape.read == 2:
            readers[name] = 2  # packed experts: their tokens are counted where they are read
    taps = Taps(model, {name: dim for name, dim in readers.items() if name not in shapes.tied})
    number = 0
    for batch in batches:
        taps.batch = len(next(iter(batch.values())))
        number += taps.batch
        with torch.no_grad(), taps:
            model(**batch)
    if not number:
        raise ValueError("Scores need data to look at, and there are no samples.")
    return {name: score.cpu() for name, score in taps.scores().items()}


def contribution(columns: Mapping[str, Tensor], shapes: Shapes, state: State) -> dict[str, Tensor]:
    """Weigh each column's activation by the norm of the weights that it is multiplied by."""
    out = {}
    for name, score in columns.items():
        if name.endswith(" tokens"):
            out[name] = score
            continue
        weight, dim = state[name].double().cpu(), shapes.tensors[name].read
        assert dim is not None
        kept = {dim, 0} if score.ndim == 2 else {dim}
        others = [i for i in range(weight.ndim) if i not in kept]
        out[name] = score * torch.linalg.vector_norm(weight, dim=others)
    return out


def unit_scores(
    columns: Mapping[str, Tensor], shapes: Shapes, axis: Axis
) -> tuple[Tensor, tuple[Axis, ...]]:
    """Gather the scores of columns to one for each unit of an axis.

    Channels inside a unit join by their L2 norm, readers by their sum. Units inside groups are
    scored in each group: query heads under their key, states in their group, neurons per expert.

    Returns:
        Scores [*by, units], and the outer axes `by`.

    Raises:
        ValueError: nothing that was seen reads the axis.
    """
    total, by = None, _outer(shapes, axis)
    for name, dim, part, _ in shapes.readers(axis):
        if name not in columns:
            continue
        parts = shapes.tensors[name].dims[dim]
        lengths = [part_size(p, shapes.sizes) for p in parts]
        score = columns[name].split(lengths, -1)[part]
        letters = parts[part]
        score = score.unflatten(-1, [part_size((u,), shapes.sizes) for u in letters])
        if score.ndim > len(letters):  # packed experts come first
            letters = (*shapes.tensors[name].dims[0][0], *letters)
        others = tuple(i for i, unit in enumerate(letters) if unit != axis and unit not in by)
        score = torch.linalg.vector_norm(score, dim=others) if others else score
        total = score if total is None else total + score
    packed = [
        n for n in dict.fromkeys(s.param for s in shapes.slots(axis)) if f"{n} tokens" in columns
    ]
    if total is None and packed:  # experts: how many tokens the router gives each
        return columns[f"{packed[0]} tokens"][:, 0], ()
    if total is None:
        names = ", ".join(slot.param for slot in shapes.readers(axis)) or "no weight"
        raise ValueError(
            f"Nothing that reads axis {axis} was seen ({names}), so its units have no activation "
            "score; take --score magnitude for it."
        )
    return total, by


def _outer(shapes: Shapes, axis: Axis) -> tuple[Axis, ...]:
    """Return the axes before this one in all its places: it is chosen in each of their units."""
    found: list[list[Axis]] = []
    for name, dim, part, place in shapes.slots(axis):
        dims = shapes.tensors[name].dims
        packed = dims[0][0] if dim and len(dims) == 3 and len(dims[0]) == 1 else ()
        before = (*packed, *dims[dim][part][:place])
        found.append([unit for unit in before if isinstance(unit, str) and unit != axis])
    return tuple(unit for unit in found[0] if all(unit in other for other in found))


def magnitude(shapes: Shapes, state: State, axis: Axis) -> Tensor:
    """Score units by the product of the norms of all weights that belong to each, in logarithms."""
    total = torch.zeros(shapes.sizes[axis], dtype=torch.float64)
    for name, dim, part, place in shapes.slots(axis):
        tensor, shape = state[name].double().cpu(), shapes.tensors[name]
        if name in shapes.tied or tensor.ndim < 2:
            continue
        lengths = [part_size(p, shapes.sizes) for p in shape.dims[dim]]
        letters = [part_size((u,), shapes.sizes) for u in shape.dims[dim][part]]
        piece = tensor.split(lengths, dim)[part].movedim(dim, -1).unflatten(-1, letters)
        keep = piece.ndim - len(letters) + place
        others = [i for i in range(piece.ndim) if i != keep]
        total += torch.linalg.vector_norm(piece, dim=others).clamp(min=1e-30).log()
    return total


def random(shapes: Shapes, axis: Axis, seed: int) -> Tensor:
    """Score units at random: the control that a score must beat."""
    draws = torch.Generator().manual_seed(seed + sum(map(ord, axis)))
    return torch.rand(shapes.sizes[axis], generator=draws, dtype=torch.float64)
