"""AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from zoo.train.config import Optim


def build_optimizer(
    model: nn.Module, config: Optim, groups: Iterable[dict[str, Any]] | None = None
) -> torch.optim.AdamW:
    """Make AdamW; biases, norms and what the model exempts (`no_weight_decay`) are not decayed.

    Args:
        groups: Parameter groups to take instead.
    """
    if groups is None:
        exempt = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(
            model, weight_decay=config.weight_decay, no_weight_decay_list=list(exempt)
        )
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


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
