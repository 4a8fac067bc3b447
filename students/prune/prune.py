"""A parent, a plan and scores give a smaller model of the same class; the method on one screen."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.axes import Axis, Shapes, State, named_shapes
from zoo.cut_format import place
from zoo.students.prune.cut import keep_layers, keep_units
from zoo.students.prune.library import Kept, NotExpressible, Parent, express, fill, reshaped
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import Cut, Proof, prove_child

ScoreUnits = Callable[[Axis], tuple[Tensor, tuple[Axis, ...]]]
"""Scores [*by, units] of an axis, and the outer axes that they are given for."""


class Child(NamedTuple):
    """A smaller model, how its library builds it, what stayed, and the proof."""

    built: Parent
    shapes: Shapes
    cuts: list[Cut]
    layers: Kept
    proof: Proof | None


def choose_units(
    shapes: Shapes, sizes: Mapping[Axis, int], score: ScoreUnits, *, by_rank: bool = False
) -> list[Cut]:
    """Choose the best units of each axis, outer axes first: heads before the channels in them.

    Args:
        by_rank: The best unit comes first; otherwise each keeps its place among the others.
    """
    scored = {axis: score(axis) for axis in sizes}
    cuts: dict[Axis, Cut] = {}
    for axis in sorted(scored, key=lambda axis: len(scored[axis][1])):
        values, by = scored[axis]
        for i, outer in enumerate(by):
            if outer in cuts:
                values = _of_kept(values, i, by, cuts[outer])
        best = values.topk(sizes[axis]).indices
        cuts[axis] = Cut(axis, best if by_rank else best.sort(-1).values, by)
    return list(cuts.values())


def _of_kept(values: Tensor, dim: int, by: tuple[Axis, ...], cut: Cut) -> Tensor:
    """Take the scores that stand under the kept units of an outer axis."""
    lengths = dict(zip(cut.by, cut.kept.shape, strict=False))
    view = [cut.kept.shape[-1] if i == dim else lengths.get(o, 1) for i, o in enumerate([*by, ""])]
    return torch.take_along_dim(values, cut.kept.view(view), dim)


def prune(
    parent: Parent,
    plan: Plan,
    score: ScoreUnits | None,
    *,
    rank_layers: Callable[[str, int], Tensor] | None = None,
    probe: Mapping[str, Any] | None = None,
    form: str = "library",
) -> Child:
    """Cut a parent, which stays as it is, to a smaller model of its own class on its own device.

    Args:
        score: None if only layers go.
        rank_layers: Scores of the layers of a list, by its path and length; the last ones go if
            there are none.
        probe: Inputs of a few samples, on the parent's device; the child must compute on them what
            the masked parent does (not where whole layers go).
        form: "library": a class and numbers that its library can build. "zoo": any widths, also
            others in each layer; `zoo.create_model` reads what is written then.

    Raises:
        ValueError: the plan names nothing that this model has.
        NotExpressible: its library cannot build what the plan asks for.
    """
    if plan.axes and score is None:
        raise ValueError(f"{', '.join(plan.axes)} cannot be chosen without scores of the units.")
    shapes = before = named_shapes(parent.model)
    state: State = dict(parent.model.state_dict())
    cuts = choose_units(shapes, plan.sizes(shapes), score) if score else []
    for axis, kept, by in cuts:
        state, shapes = keep_units(shapes, state, axis, kept, by)
    layers = choose_layers(before, plan, rank_layers)
    if not cuts and not layers and not parent.emulated:
        raise ValueError("This plan cuts nothing: each list of layers and axis keeps its size.")
    for path, kept in layers.items():
        state = keep_layers(shapes, state, path, kept)
    if form == "zoo":
        built = reshaped(parent, before, shapes, layers, state)
    else:
        built = express(parent, before, shapes, layers)
        built = replace(built, model=fill(built, state), folder=parent.folder)
    after = named_shapes(built.model)
    numbers = sum({place(t): t.numel() for t in state.values()}.values())  # shared ones once
    assert after.count() == numbers, f"{after.count()} numbers by letters, {numbers} in tensors"
    proof = None
    if probe is not None and not layers:
        try:
            proof = prove_child(parent.model, built.model, before, cuts, probe)
        except (RuntimeError, AssertionError) as error:
            raise NotExpressible(
                f"{type(parent.model).__name__} keeps something of its old width that the tables "
                f"do not name, and does not run at the new one: {error}"
            ) from error
    return Child(built, after, cuts, layers, proof)


def choose_layers(
    shapes: Shapes, plan: Plan, rank: Callable[[str, int], Tensor] | None
) -> dict[str, list[int]]:
    """Choose which layers of each list stay; the paths of lists that lose none are left out."""
    out = {}
    for entry in shapes.layers:
        length = shapes.num_layers(entry.path)
        number = plan.num_layers(entry.path, length)
        if number < length:
            values = rank(entry.path, length) if rank else -torch.arange(float(length))
            out[entry.path] = values.topk(number).indices.sort().values.tolist()
    return out
