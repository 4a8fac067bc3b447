"""AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from zoo.train.config import Optim
from zoo.train.shard import local


class LocalAdamW(torch.optim.AdamW):
    """AdamW on what this rank holds of parameters that are cut; each element is on its own anyway.

    Given DTensors, torch 2.11 remembers each learning rate that it has met, with a plan for every
    parameter: a million objects in a few hundred steps of a ViT-H.
    """

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, group: dict[str, Any], *lists: Any
    ) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(x) for x in tensors]
        return has_complex


def build_optimizer(
    model: nn.Module,
    config: Optim,
    groups: Iterable[dict[str, Any]] | None = None,
    apart: Collection[str] = (),
) -> torch.optim.AdamW:
    """Make AdamW; biases, norms and what the model exempts (`no_weight_decay`) are not decayed.

    Args:
        groups: Parameter groups to take instead.
        apart: Names of parameters that stand in groups of their own, for the same settings: those
            that may be cut over ranks where others are not, which no fused step takes together.
    """
    if groups is None and config.layer_decay < 1:
        groups = parameter_groups(model, config)
    if groups is None:
        exempt = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(
            model, weight_decay=config.weight_decay, no_weight_decay_list=list(exempt)
        )
    if apart:
        named = dict(model.named_parameters())
        groups = divided(groups, {id(named[name]) for name in apart})
    fused = next(model.parameters()).is_cuda
    return LocalAdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def divided(groups: Iterable[dict[str, Any]], apart: Collection[int]) -> Iterator[dict[str, Any]]:
    """Yield each group as two, where it has parameters of both kinds, told by their ids."""
    for group in groups:
        for kind in (False, True):
            if part := [p for p in group["params"] if (id(p) in apart) == kind]:
                yield dict(group, params=part)


def parameter_groups(
    model: Any, config: Optim, *, backbone_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Split what learns by its rate (`scale`) and decay; biases and norms are not decayed.

    With a layer decay d, block l of the L in a backbone learns at d^(L − l) times the rate of the
    heads (BEiT, 2106.08254), counted by timm's `group_matcher`.

    Args:
        model: Its `backbone` if it has one, else all of it, is what the decay is for.
        backbone_lr: Factor of the backbone's rate.

    Raises:
        ValueError: there is a layer decay, and the backbone does not name its layers.
    """
    backbone = getattr(model, "backbone", model)
    own = {id(p) for p in backbone.parameters()}
    rest = nn.Module()
    for i, (name, p) in enumerate(model.named_parameters()):
        if id(p) not in own:  # the names only decide what is a bias
            rest.register_parameter(f"{i}_{name.rpartition('.')[2]}", p)
    groups = param_groups_weight_decay(rest, config.weight_decay)
    inner = getattr(backbone, "model", backbone)
    shared: dict[str, Any] = dict(
        weight_decay=config.weight_decay,
        no_weight_decay_list=list(getattr(inner, "no_weight_decay", set)()),
    )
    if config.layer_decay == 1:
        deep = param_groups_weight_decay(inner, **shared)
    elif hasattr(inner, "group_matcher"):
        deep = param_groups_layer_decay(inner, **shared, layer_decay=config.layer_decay)
    else:
        raise ValueError(
            "This backbone does not name its layers (timm's group_matcher); leave out "
            "layer_decay, or choose another."
        )
    for group in deep:
        group["scale"] = group.pop("lr_scale", 1.0) * backbone_lr
        group.pop("param_names", None)
    return [dict(scale=1.0) | group for group in (*groups, *deep) if group["params"]]


def learning_rate(step: int, steps: int, config: Optim) -> float:
    """Rise linearly for the warm-up, and follow the schedule down to `min_lr`."""
    warmup = round(config.warmup * steps)
    if config.schedule == "linear":
        share = min((step + 1) / max(1, warmup), 1.0) * (1 - step / steps)
        return config.min_lr + (config.lr - config.min_lr) * share
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
