"""One model, many sizes: units sorted by their scores, so that the first ones are a smaller model.

Flextron (2406.10260) and Nemotron Elastic (2511.16664): sizes are nested in one set of weights, and
trained together (`zoo.train.elastic`).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.axes import Axis, Shapes, State, dim_size
from zoo.students.prune.cut import keep_units
from zoo.students.prune.library import Parent
from zoo.students.prune.masked import Masked, Size, Widths, unsaved
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import LIMIT, Cut, full_precision, tensors
from zoo.students.prune.prune import Child, ScoreUnits, choose_layers, choose_units, prune

FULL = "full"
"""The name of the whole model among the sizes."""

Ranks = Mapping[str, Sequence[int]]
"""The layers of each list by their rank, the most important first."""


def parse_sizes(text: str) -> dict[str, Plan]:
    """Read `small:ffn=0.5,stream=0.5;medium:ffn=0.75`, in the words of `zoo prune --to`.

    Raises:
        ValueError: a part is no `name:words`, or a name is there twice.
    """
    plans: dict[str, Plan] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, words = part.partition(":")
        if not colon or not re.fullmatch(r"\w[\w.-]*", name) or name in (FULL, *plans):
            raise ValueError(
                f"{part!r} is no size: write NAME:WORDS with a name of its own (not {FULL!r}), for "
                "example small:ffn=0.5,stream=0.5;medium:ffn=0.75."
            )
        plans[name] = Plan.parse(words)
    if not plans:
        raise ValueError("There is no size; give for example small:ffn=0.5;medium:ffn=0.75.")
    return plans


def rank_units(shapes: Shapes, plans: Iterable[Plan], score: ScoreUnits) -> list[Cut]:
    """Order the units of every axis that a plan cuts, the best first."""
    axes = {axis for plan in plans for axis in plan.sizes(shapes)}
    whole = {axis: shapes.sizes[axis] for axis in shapes.sizes if axis in axes}
    return choose_units(shapes, whole, score, by_rank=True)


def sort_units(shapes: Shapes, state: State, orders: Iterable[Cut]) -> State:
    """Permute the units of axes: the same function, whose prefixes are the sizes."""
    for axis, order, by in orders:
        state, shapes = keep_units(shapes, state, axis, order, by)
    return state


def size_of(shapes: Shapes, plan: Plan, ranks: Ranks) -> Size:
    """Say what counts of a sorted model at a size."""
    widths = {axis: Widths((size,)) for axis, size in plan.sizes(shapes).items()}
    return Size(widths, choose_layers(shapes, plan, _by_rank(ranks)))


@torch.no_grad()
def checked_size(
    parent: Parent,
    masked: Masked,
    plan: Plan,
    ranks: Ranks,
    probe: Mapping[str, Any],
    *,
    form: str = "library",
) -> Size:
    """Say what counts at a size, after the child that will be cut there has given the same outputs.

    Raises:
        NotExpressible: its library cannot build that size.
        ValueError: the masked model is not that child, so it cannot be trained for it.
    """
    shapes, size = masked.shapes, size_of(masked.shapes, plan, ranks)
    child = cut_to(parent, shapes, plan, ranks, form=form).built.model
    own = unsaved(child)
    different = {
        name: own[name]
        for name, buffer in unsaved(parent.model).items()
        if name in own and own[name].shape == buffer.shape and not torch.equal(own[name], buffer)
    }
    size = replace(size, buffers=different)
    with full_precision(next(iter(probe.values())).device):
        whole, expected = (list(tensors(model(**probe))) for model in (parent.model, child))
        with masked.at(size):
            found = list(tensors(parent.model(**probe)))
    wrong = cut = 0.0
    for ours, theirs, before in zip(found, expected, whole, strict=True):
        first = tuple(map(slice, theirs.shape))  # an output may be what was cut
        wrong = max(wrong, float((ours[first] - theirs).abs().max()))
        cut = max(cut, float((ours[first] - before[first]).abs().max()))
    if not wrong < LIMIT * cut:
        raise ValueError(
            f"Masked to a size, {type(parent.model).__name__} differs from the model cut to it by "
            f"{wrong:.1e}, and the cut moved outputs by {cut:.1e}: it cannot be trained as one."
        )
    return size


def numbers(shapes: Shapes, size: Size) -> Any:
    """Count the numbers of a size; of a choice of widths, with its gradient, for their mean."""
    sizes: dict[Axis, Any] = dict(shapes.sizes)
    for axis, width in size.widths.items():
        share = width.mixture().double()
        each = share.new_tensor(width.sizes)
        sizes[axis] = (share @ each).mean() if width.share is not None else width.sizes[0]
    total = 0
    for name, shape in shapes.tensors.items():
        if name not in shapes.tied:
            length = math.prod(dim_size(dim, sizes) for dim in shape.dims)
            total = total + length * _present(name, size)
    return total


def _present(name: str, size: Size) -> Any:
    """Return how much of a tensor's layer there is."""
    for path, kept in size.layers.items():
        if name.startswith(f"{path}."):
            layer = int(name[len(path) + 1 :].partition(".")[0])
            return kept[layer] if isinstance(kept, Tensor) else layer in kept
    return 1


def cut_to(
    parent: Parent,
    shapes: Shapes,
    plan: Plan,
    ranks: Ranks,
    *,
    form: str = "library",
) -> Child:
    """Take a size out of a sorted model, as a model of its library's own class.

    Raises:
        NotExpressible: its library cannot build that size.
    """

    def by_place(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
        return -torch.arange(float(shapes.sizes[axis])), ()

    return prune(parent, plan, by_place, rank_layers=_by_rank(ranks), form=form)


def _by_rank(ranks: Ranks):
    def scores(path: str, length: int) -> Tensor:
        order = torch.as_tensor(ranks[path])
        return torch.empty(length).index_copy_(0, order, -torch.arange(float(length)))

    return scores
