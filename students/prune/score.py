"""How much each unit of each axis matters: what passes through it, its weights, or their gradients.

`activation` measures the columns of all weights that read an axis (`zoo.students.prune.taps`), and
`contribution` and `wanda` weigh them; `unit_scores` makes one number for each unit of them. What no
product reads, the states of a scan, is scored by leaving it out (`zoo.students.prune.removal`).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from zoo.axes import Axis, Shape, Shapes, State, part_size
from zoo.students.prune.proof import is_experts
from zoo.students.prune.taps import Inputs, OverSamples, OverTokens, Tap, Taps, Total, alone


def activation(
    model: nn.Module,
    shapes: Shapes,
    batches: Iterable[Inputs],
    axes: Iterable[Axis],
    *,
    tokens: OverTokens = "mean",
    samples: OverSamples = "l2",
    total: Total = alone,
) -> dict[str, Tensor]:
    """Run the model and score the columns of all weights that read these axes, on its device.

    Minitron (2407.14679), its best aggregation: the L2 norm over samples of the mean over tokens
    of the absolute activation. Equal however the samples are cut into batches or shared out over
    ranks; tokens that `attention_mask` hides do not count. The variance is that of the signed
    activations over tokens, of what the tokens gave over samples.

    Raises:
        ValueError: there are no batches.
    """
    seen = Taps(model, taps_of(shapes, axes), tokens, samples)
    seen.run(model, batches)
    return seen.scores(total)


def taps_of(shapes: Shapes, axes: Iterable[Axis]) -> list[Tap]:
    """List the weights whose columns run along axes, and those that hold packed experts."""
    axes = list(axes)
    columns = {s.param: s.dim for axis in axes for s in shapes.readers(axis)}
    for name in {s.param for axis in axes for s in shapes.slots(axis)}:
        shape = shapes.tensors[name]
        if shape.read is not None and len(shape.dims) == 3 and shape.read == 2:
            columns[name] = 2  # packed experts: their tokens are counted where they are read
    return [Tap(n, dim) for n, dim in columns.items() if shapes.tied.get(n) not in columns]


def contribution(
    columns: Mapping[str, Tensor], shapes: Shapes, state: State, *, order: int = 2
) -> dict[str, Tensor]:
    """Weigh each column's activation by the norm of the weights that it is multiplied by.

    Args:
        order: Of the norm. With 1, and activations by their L2 norms over tokens and samples, it
            is the sum of Wanda's scores (2306.11695), |W| x norm of the input, of all weights that
            read a unit.
    """
    out = {}
    for name, score in columns.items():
        if name.endswith(" tokens"):
            out[name] = score
            continue
        weight, dim = state[name].double().cpu(), shapes.tensors[name].read
        assert dim is not None
        kept = {dim, 0} if score.ndim == 2 else {dim}
        others = [i for i in range(weight.ndim) if i not in kept]
        out[name] = score * torch.linalg.vector_norm(weight, order, dim=others)
    return out


def routing(
    model: nn.Module,
    shapes: Shapes,
    batches: Iterable[Inputs],
    axes: Iterable[Axis],
    *,
    total: Total = alone,
) -> dict[Axis, Tensor]:
    """Score experts by the probability that their router gives them, the mean over all tokens.

    The softmax of what the router's weight gives, also where a model goes on with a sigmoid.

    Raises:
        ValueError: there are no batches, or an axis has no router.
    """
    routers = {}
    for axis in axes:
        if not is_experts(shapes, axis):
            raise ValueError(f"Axis {axis} has no router; its units are no experts.")
        routers[axis] = next(n for n, shape in shapes.tensors.items() if _routes(shape, axis))
    taps = [Tap(name, 0, lambda out: out.softmax(-1)) for name in routers.values()]
    seen = Taps(model, taps, "mean", "mean")
    seen.run(model, batches)
    found = seen.scores(total)
    return {axis: found[name] for axis, name in routers.items()}


def _routes(shape: Shape, axis: Axis) -> bool:
    return shape.dims[:1] == (((axis,),),) and len(shape.dims) == 2 and shape.read == 1


def x_score(
    model: nn.Module,
    shapes: Shapes,
    batches: Iterable[Inputs],
    axis: Axis,
    *,
    total: Total = alone,
) -> tuple[Tensor, tuple[Axis, ...]]:
    """Score heads or channels of a Mamba-2 mixer by the x part of what its input projection gives.

    Minitron-SSM (2504.11409), as its readers restate it: the same channels in all heads, by the
    norm over the heads; heads in their group, by the norm over their channels. In our pilot it was
    no better than chance; `contribution` is the better score, and ranks channels in each head.

    Raises:
        ValueError: the axis is not of such a mixer.
    """
    name = x_rows(shapes, axis)
    if not name:
        raise ValueError(
            f"Axis {axis} is no head or channel of a Mamba-2 mixer, and the x-score is for nothing "
            "else; take --score contribution."
        )
    parts = shapes.tensors[name].dims[0]
    seen = Taps(model, [Tap(name, 0, lambda out: out)])
    seen.run(model, batches)
    rows = seen.scores(total)[name].split([part_size(p, shapes.sizes) for p in parts])[1]
    grid = rows.unflatten(0, [part_size((u,), shapes.sizes) for u in parts[1]])
    if axis == parts[1][-1]:
        return torch.linalg.vector_norm(grid, dim=(0, 1)), ()
    return torch.linalg.vector_norm(grid, dim=2), (str(parts[1][0]),)


def x_rows(shapes: Shapes, axis: Axis) -> str:
    """Name the projection whose rows `x_score` measures, z | x | B | C | dt; empty without one."""
    for name, shape in shapes.tensors.items():
        parts = shape.dims[0]
        if shape.read == 1 and len(parts) == 5 and parts[0] == parts[1] and axis in parts[1][1:]:
            return name
    return ""


def unit_scores(
    columns: Mapping[str, Tensor], shapes: Shapes, axis: Axis
) -> tuple[Tensor, tuple[Axis, ...]]:
    """Gather the scores of columns to one for each unit of an axis.

    Channels inside a unit join by their L2 norm, readers by their sum. Units inside groups are
    scored in each group: query heads under their key, states in their group, neurons per expert.

    Returns:
        Scores [*by, units], and the outer axes `by`.

    Raises:
        ValueError: a weight that reads the axis was not seen, or there is none.
    """
    total, by = None, outer_axes(shapes, axis)
    packed = [
        n for n in dict.fromkeys(s.param for s in shapes.slots(axis)) if f"{n} tokens" in columns
    ]
    readers = [s for s in shapes.readers(axis) if shapes.tied.get(s.param) not in columns]
    if unseen := list(dict.fromkeys(s.param for s in readers if s.param not in columns)):
        raise ValueError(
            f"Axis {axis} is read by {len(unseen)} weights that no product of this model and these "
            f"data used, so its units cannot be scored by what they do: {', '.join(unseen[:4])}. "
            "Take --score magnitude, or data that reach them."
        )
    for name, dim, part, _ in readers:
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
    if total is None and packed:  # experts: how many tokens the router gives each
        return columns[f"{packed[0]} tokens"][:, 0], ()
    if total is None:
        raise ValueError(
            f"No weight reads axis {axis}, so its units have no activation; leave them out one by "
            "one (zoo.students.prune.removal), or take --score magnitude."
        )
    return total, by


def outer_axes(shapes: Shapes, axis: Axis) -> tuple[Axis, ...]:
    """Return the axes before this one in all its places: it is chosen in each of their units."""
    found: list[list[Axis]] = []
    for name, dim, part, place in shapes.slots(axis):
        dims = shapes.tensors[name].dims
        packed = dims[0][0] if dim and len(dims) == 3 and len(dims[0]) == 1 else ()
        before = (*packed, *dims[dim][part][:place])
        found.append([unit for unit in before if isinstance(unit, str) and unit != axis])
    return tuple(unit for unit in found[0] if all(unit in other for other in found))


def unit_sums(values: State, shapes: Shapes, axis: Axis) -> Tensor:
    """Add up a number for each weight, over all weights that belong to a unit, [*by, units]."""
    by = outer_axes(shapes, axis)
    wanted = [*by, axis]
    total = torch.zeros([shapes.sizes[a] for a in wanted], dtype=torch.float64)
    for name, dim, part, _ in shapes.slots(axis):
        if name not in values or name in shapes.tied:
            continue
        piece, letters = letters_of(values[name].double().cpu(), shapes, name, dim, part)
        places = [letters.index(a) for a in wanted]
        others = [i for i in range(piece.ndim) if i not in places]
        summed = piece.sum(others) if others else piece
        order = sorted(places)
        total += summed.permute([order.index(place) for place in places])
    return total


def letters_of(
    tensor: Tensor, shapes: Shapes, name: str, dim: int, part: int
) -> tuple[Tensor, list[Axis | int]]:
    """Take one stacked part of one dim, with a dim for each of its letters; others of one part
    too."""
    dims = shapes.tensors[name].dims
    lengths = [part_size(p, shapes.sizes) for p in dims[dim]]
    piece, letters, sizes = tensor.split(lengths, dim)[part], [], []
    for i, parts in enumerate(dims):
        inner = dims[dim][part] if i == dim else parts[0] if len(parts) == 1 else (-1,)
        letters += inner
        sizes += (
            [piece.shape[i]] if inner == (-1,) else [part_size((u,), shapes.sizes) for u in inner]
        )
    return piece.reshape(sizes), letters


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
