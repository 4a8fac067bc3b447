"""The students of a cell: cut by scores, cut at random, or of that size with new weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gemma.cells import Cell, plan_of
from zoo.axes import Axis, named_shapes
from zoo.data.text import TextSource
from zoo.students.prune import score
from zoo.students.prune.layers import block_influence
from zoo.students.prune.library import Parent, rebuilt
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import Child, prune

LAYERS = "model.layers"


class Cutter:
    """Cuts a parent by scores that are computed once, on the seen text.

    Args:
        rows: Rows of the seen text that scores look at.
    """

    def __init__(self, parent: Any, seen: TextSource, *, rows: int, batch: int):
        self.parent, self.shapes = Parent(parent), named_shapes(parent)
        self.device = next(parent.parameters()).device
        self.state = parent.state_dict()
        given = range(0, min(rows, len(seen)), batch)
        self.batches = [
            dict(input_ids=seen.rows(range(i, min(i + batch, rows, len(seen)))).ids.to(self.device))
            for i in given
        ]
        axes = [axis for axis in self.shapes.sizes if axis.endswith(".f")]
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            columns = score.activation(parent, self.shapes, self.batches, axes)
            self.influence = block_influence(parent, LAYERS, self.batches)
        weighed = score.contribution(columns, self.shapes, self.state)
        self.columns = dict(activation=columns, contribution=weighed)

    def units(self, name: str, seed: int) -> Callable[[Axis], tuple[Tensor, tuple[Axis, ...]]]:
        """Return what ranks units by a score of this name."""

        def rank(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
            if name == "random":
                return score.random(self.shapes, axis, seed), ()
            if name == "magnitude":
                return score.magnitude(self.shapes, self.state, axis), ()
            return score.unit_scores(self.columns[name], self.shapes, axis)

        return rank

    def cut(self, plan: Plan, name: str, seed: int = 0) -> Child:
        """Cut by a score; layers go by block influence, or at random as the units do."""

        def layers(path: str, length: int) -> Tensor:
            if name != "random":
                return self.influence
            return torch.rand(length, generator=torch.Generator().manual_seed(seed))

        return prune(self.parent, plan, self.units(name, seed), rank_layers=layers)

    def student(self, cell: Cell, name: str) -> tuple[Any, list[int]]:
        """Make the student of a cell, and list the layers that it has of its parent's."""
        plan = plan_of(self.parent.model.config, cell.share, cell.shape)
        chosen = "random" if cell.begin == "random" else name
        child = self.cut(plan, chosen, cell.seed)
        kept = child.layers.get(LAYERS, list(range(len(self.influence))))
        if cell.begin != "scratch":
            return child.built.model.to(self.device), list(kept)
        torch.manual_seed(cell.seed)
        with self.device:
            return rebuilt(child.built).float(), []
