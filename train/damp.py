"""Noise on the weights of each training step (DAMP)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zoo.train.shard import cut_like, local


@contextmanager
def damped(model: nn.Module, sigma: float) -> Iterator[None]:
    """Multiply the weights by noise while a step runs forward and backward (2406.16540).

        W ← W ⊙ (1 + σ ε),    ε ~ N(0, 1)

    Afterwards the weights are what they were, to the bit, and their gradients those of the plain
    weights (the chain rule multiplies them by the noise). So the optimizer, the average, every
    checkpoint and the export only ever hold plain weights. C-RADIOv4 trains with DAMP and says no
    more of it; this is the standard form, one draw a step for all images.

    It works in place: compiled and parametrised models see ordinary parameters. The noise comes
    from torch's global generator, which the loop seeds for each step.

    Args:
        sigma: Standard deviation; at 0 nothing is touched and nothing is drawn.
    """
    weights: list[Tensor] = _weights(model) if sigma else []
    if not weights:
        yield
        return
    with torch.no_grad():
        plain = [w.clone() for w in map(local, weights)]
        # drawn whole where weights are cut, so that the noise is that of one process
        drawn = (torch.randn(w.shape, dtype=w.dtype, device=w.device) for w in weights)
        noise = [cut_like(x.mul_(sigma).add_(1), w) for x, w in zip(drawn, weights, strict=True)]
        torch._foreach_mul_(list(map(local, weights)), list(map(local, noise)))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(map(local, weights)), plain)
            pairs = [(w.grad, n) for w, n in zip(weights, noise, strict=True) if w.grad is not None]
            for gradient, factor in pairs:
                gradient.mul_(factor)


def _weights(model: nn.Module) -> list[Tensor]:
    """List the matrices and kernels; scales, biases, tokens and positions stay as they are.

    `original` is the weight below a parametrisation.
    """
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and name.rpartition(".")[2] in ("weight", "original")
    ]
