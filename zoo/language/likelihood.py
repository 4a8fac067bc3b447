"""How likely a model finds given tokens: their logarithms, and whether each would be chosen."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Scored(NamedTuple):
    """What a model makes of each of n tokens."""

    nll: Float[Tensor, " n"]
    """Minus the logarithm of its probability, in nats."""
    chosen: Bool[Tensor, " n"]
    """It is the most probable one: greedy generation would continue with it."""


@torch.no_grad()
def score_tokens(
    last: Float[Tensor, "n D"],
    head: Float[Tensor, "V D"],
    following: Int[Tensor, " n"],
    *,
    chunk: int = 1024,
) -> Scored:
    """Score the token behind each hidden state; logits exist for `chunk` of them at a time."""
    parts = []
    for start in range(0, len(last), chunk):
        here = slice(start, start + chunk)
        logits = (last[here] @ head.T.to(last)).float()
        nll = F.cross_entropy(logits, following[here], reduction="none")
        parts.append(Scored(nll, logits.argmax(1) == following[here]))
    if not parts:
        return Scored(last.new_zeros(0).float(), last.new_zeros(0).bool())
    return Scored(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
