"""Mixtures of experts: how tokens choose them, and the losses that keep the choice even.

Routers and experts are transformers' modules: a router (`gate`) returns logits, weights of the
chosen experts and their numbers; experts take tokens, the numbers and the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.layers.sequence import Group


class Routing(NamedTuple):
    weights: Float[Tensor, "n T"]
    experts: Int[Tensor, "n T"]


def balance_loss(
    logits: Float[Tensor, "n E"], experts: Int[Tensor, "n T"], group: Group = None
) -> Float[Tensor, ""]:
    """Return the auxiliary loss that is T where all experts get as much, and at most E T.

    Switch Transformer (2101.03961, equations 4 to 6) for T experts a token: E sum_i f_i P_i, with
    the share f_i of tokens that go to expert i and the mean P_i of its probability.

    Args:
        group: Ranks that have the other tokens: shares and means are over all of them, and what is
            returned is this rank's summand.
    """
    num_experts = logits.shape[1]
    counts = F.one_hot(experts, num_experts).sum((0, 1))
    total = counts.new_tensor([len(logits)])
    if group is not None:
        both = torch.cat([counts, total])
        dist.all_reduce(both, group=group)
        counts, total = both.split([num_experts, 1])
    share = counts.to(logits.dtype) / total
    return num_experts * (share * logits.softmax(-1).sum(0) / total).sum()


def z_loss(logits: Float[Tensor, "n E"], total: int | None = None) -> Float[Tensor, ""]:
    """Return the loss that keeps a router's logits small (ST-MoE, 2202.08906, equation 5).

    The mean over tokens of log²(sum of exp(logits)).

    Args:
        total: How many tokens there are with those of other ranks.
    """
    return logits.logsumexp(-1).square().sum() / (len(logits) if total is None else total)


class MoE(NamedTuple):
    """One layer's parts."""

    router: nn.Module
    experts: nn.Module


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Return the mixtures of a model of transformers, by the names of their modules."""
    found = {}
    for name, module in model.named_modules():
        router, experts = getattr(module, "gate", None), getattr(module, "experts", None)
        if isinstance(router, nn.Module) and isinstance(experts, nn.Module):
            found[name] = MoE(router, experts)
    return found


class Chosen(NamedTuple):
    """What one router did in one forward pass."""

    logits: Float[Tensor, "n E"]
    experts: Int[Tensor, "n T"]


@contextmanager
def watched_routers(model: nn.Module, found: list[Chosen]) -> Iterator[None]:
    """Add to a list what every router of a model does while the block runs."""

    def note(module: nn.Module, args: Any, out: Any) -> None:
        logits, _, experts = out
        found.append(Chosen(logits, experts))

    hooks = [layer.router.register_forward_hook(note) for layer in moe_layers(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
