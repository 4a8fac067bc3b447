"""How many FLOPs a forward pass takes, as torch counts them."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def total_flops(run: Callable[[], object], *models: nn.Module) -> int:
    """Return the FLOPs of `run()`: those of its convolutions and matrix products.

    Attention's products are among them, elementwise operations are not. Give the models that it
    runs: their parameters need no gradient while they are counted. A learnt query that is expanded
    (attention pooling of SigLIP in timm) is a view that needs a gradient and has no function of
    one, even under `no_grad`, and torch's counter refuses to hook it.
    """
    learnt = [p for model in models for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learnt:
            parameter.requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)
    return counter.get_total_flops()
