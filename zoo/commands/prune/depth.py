"""Which layers `zoo prune` leaves out, and which branches inside them."""

from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zoo.axes import Shapes
from zoo.commands.prune.data import Samples
from zoo.commands.prune.request import Prune
from zoo.students.prune.emulate import emulate
from zoo.students.prune.layers import (
    Without,
    block_influence,
    own_metric,
    part_scores,
    sublayers,
)
from zoo.students.prune.library import Parent
from zoo.students.prune.plan import Plan
from zoo.train.device import autocast

Batches = Callable[[], Iterable[Samples]]


def rank_layers(
    args: Prune, plan: Plan, parent: Parent, batches: Batches
) -> Callable[[str, int], Tensor]:
    """Return the scores of the layers of a list, by its path and length."""
    model = parent.model
    device = next(model.parameters()).device

    def rank(path: str, length: int) -> Tensor:
        with autocast("auto", device):
            influence = block_influence(model, path, batches())
            if args.layer_score == "influence":
                return influence
            able = influence.isfinite().nonzero().flatten()  # the others change the width
            parts = [f"{path}.{int(i)}" for i in able]
            gone = min(length - plan.num_layers(path, length), len(parts))
            value = Without(model, parts, own_metric(model, batches))
            scores = part_scores(args.layer_score, value, len(parts), gone, seed=args.seed)
        return torch.full_like(influence, torch.inf).index_copy_(0, able, scores)

    return rank


def thin(args: Prune, plan: Plan, parent: Parent, shapes: Shapes, batches: Batches) -> Parent:
    """Leave out branches, attention or FFN, of the layers; something small may stand in for them.

    Raises:
        ValueError: no branch of the kind can go.
    """
    device = next(parent.model.parameters()).device
    method = "loss" if args.layer_score == "influence" else args.layer_score
    table = Table("branch", "cost of going", "")
    gone: list[str] = []
    with autocast("auto", device):
        metric = own_metric(parent.model, batches)
        for kind in plan.sublayers:
            lists = [sublayers(parent.model, shapes, entry.path) for entry in shapes.layers]
            parts = [path for found in lists for path in found.get(kind, ())]
            number = len(parts) - plan.num_sublayers(kind, len(parts)) if parts else 0
            if kind == "attention" and hasattr(parent.model, "config"):
                parts = parts[1:]  # transformers' cache asks the first one how long the text is
            if not number or number > len(parts):
                raise ValueError(
                    f"Of {len(parts)} {kind} branches that can go, {number} should: change "
                    f"{kind}_layers. A branch has no norm of the stream inside, which BERT's have."
                )
            value = Without(parent.model, parts, metric, adds=True)
            scores = part_scores(method, value, len(parts), number, seed=args.seed)
            chosen = set(scores.topk(number, largest=False).indices.tolist())
            gone += [parts[i] for i in sorted(chosen)]
            for i, path in enumerate(parts):
                table.add_row(path, f"{scores[i]:.4f}", "goes" if i in chosen else "")
        Console().print(table)
        return emulate(parent, gone, batches, rank=args.emulate)
