"""Scores by gradients: how much a loss moves, to first order, when a unit's weights go."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.axes import Axis, Shapes, State
from zoo.students.prune.proof import tensors
from zoo.students.prune.score import unit_sums
from zoo.students.prune.taps import Inputs, Total, alone, seen_products

LossOf = Callable[[nn.Module, Inputs], Tensor]
"""A loss of a batch, summed over its samples (so that batches add up)."""


def taylor(
    model: nn.Module,
    shapes: Shapes,
    batches: Iterable[Inputs],
    axes: Iterable[Axis],
    loss: LossOf | None = None,
    *,
    total: Total = alone,
) -> dict[Axis, Tensor]:
    """Score units by |weight x gradient|, summed over all weights that belong to each.

    First-order Taylor expansion (Molchanov and others, 1906.10771; LLM-Pruner, 2305.11627, its
    element-wise form). It sees every axis, states of a scan too. The gradient is that of all
    samples together.

    Args:
        loss: `own_loss` if None.

    Returns:
        For each axis, scores [*outer, units].

    Raises:
        ValueError: there are no batches.
    """
    axes, loss = list(axes), loss or own_loss
    names = {slot.param for axis in axes for slot in shapes.slots(axis)}
    weights = {name: p for name, p in model.named_parameters() if name in names}
    asked = {name: p.requires_grad for name, p in weights.items()}
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}
    number = 0
    try:
        for p in weights.values():
            p.requires_grad_(True)
        with torch.enable_grad(), seen_products(model):
            for batch in batches:
                number += len(next(iter(batch.values())))
                value = loss(model, batch)
                found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[name] += gradient
    finally:
        for name, p in weights.items():
            p.requires_grad_(asked[name])
    if not number:
        raise ValueError("Scores need data to look at, and there are no samples.")
    values: State = {n: (weights[n].detach() * total(g)).abs() for n, g in sums.items()}
    return {axis: unit_sums(values, shapes, axis) for axis in axes}


def own_loss(model: nn.Module, batch: Inputs) -> Tensor:
    """Compute a loss that needs no labels: of the next token, else along one random direction.

    The distance to a model's own outputs has no gradient where it stands, so outputs of other
    kinds are projected onto a direction that is the same for all samples: in the mean over
    directions, the square of what it moves is the square of that distance.
    """
    out = next(tensors(model(**batch)))
    ids = batch.get("input_ids")
    mask = torch.ones_like(ids) if ids is not None else None
    mask = batch.get("attention_mask", mask)
    if ids is not None and mask is not None and gives_logits(model, batch, out):
        each = F.cross_entropy(out[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        kept = mask[:, 1:]
        return ((each * kept).sum(1) / kept.sum(1).clamp(min=1)).sum()
    rows = mask is not None and out.shape[:2] == mask.shape  # of text, that differ in length
    draws = torch.Generator().manual_seed(0)
    shape = out.shape[2:] if rows else out.shape[1:]
    direction = (torch.randint(0, 2, shape, generator=draws) * 2 - 1).to(out)
    along = (out * direction).flatten(2 if rows else 1).sum(-1) / direction.numel() ** 0.5
    return ((along * mask).sum(1) / mask.sum(1)).sum() if rows and mask is not None else along.sum()


def gives_logits(model: nn.Module, batch: Inputs, out: Tensor) -> bool:
    """Tell whether an output holds the logits of a token for each token that went in."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    ids = batch.get("input_ids")
    return head is not None and ids is not None and out.ndim == 3 and out.shape[:2] == ids.shape
