"""The state-space duality of Mamba-2 (2405.21060): products of matrices within chunks of tokens."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.layers.sequence import Group, states_before


class Ssd(NamedTuple):
    out: Float[Tensor, "B T H D"]
    state: Float[Tensor, "B H D S"]
    """After the last token."""
    decay: Float[Tensor, "B T H"]
    """What is left at each token of the state before the first one."""


def ssd(
    x: Float[Tensor, "B T H D"],
    delta: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B T G S"],
    C: Float[Tensor, "B T G S"],
    *,
    chunk: int = 64,
) -> Ssd:
    """Run Mamba-2's recurrence from a zero state; H / G neighbouring heads share their B and C.

        h_t = exp(Δ_t A) h_(t-1) + Δ_t x_t B_tᵀ,    y_t = h_t C_t

    Plain torch (2405.21060, section 6). Within a chunk it is attention with decays for a mask.
    Every exponent is a sum of Δ A, never the negative of one: with A <= 0 nothing overflows.

    Args:
        delta: Step sizes, positive.
        A: Negative decay rates.
        chunk: Tokens whose products with each other are written out.

    Returns:
        The output in the dtype of `x`, state and decay in float32, or in float64 if that is `x`'s.
    """
    dtype, length, groups = x.dtype, x.shape[1], B.shape[2]
    x, delta, A, B, C = (
        t.to(torch.promote_types(dtype, torch.float32)) for t in (x, delta, A, B, C)
    )
    decay = (delta * A).cumsum(1).exp()
    pad = max(1, math.ceil(length / chunk)) * chunk - length  # Δ = 0 leaves the state as it is
    x, B, C = (_chunks(t, chunk, pad) for t in (x * delta[..., None], B, C))
    x = x.unflatten(3, (groups, -1))  # [B chunks chunk G H/G D]
    log_decay = _chunks(delta * A, chunk, pad).cumsum(2).unflatten(3, (groups, -1))

    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    gaps = log_decay[:, :, :, None] - log_decay[:, :, None]
    mask = gaps.masked_fill(future[..., None, None], -torch.inf).exp()
    scores = torch.einsum("bctgs,bcugs->bctug", C, B)[..., None] * mask
    out = torch.einsum("bctugh,bcughd->bctghd", scores, x)

    left = (log_decay[:, :, -1:] - log_decay).exp()
    last = torch.einsum("bcughd,bcugs->bcghds", left[..., None] * x, B)
    state, states = torch.zeros_like(last[:, 0]), []
    for entry, factor in zip(last.unbind(1), log_decay[:, :, -1].exp().unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(entry, factor[..., None, None], state)
    carried = torch.einsum("bctgs,bcghds->bctghd", C, torch.stack(states, 1))
    out = out + carried * log_decay.exp()[..., None]
    out = out.flatten(3, 4).flatten(1, 2)[:, :length].to(dtype)
    return Ssd(out, state.flatten(1, 2), decay)


def _chunks(x: Tensor, chunk: int, pad: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.ndim - 2) + [0, pad]).unflatten(1, (-1, chunk))


def ssd_over_ranks(
    x: Float[Tensor, "B t H D"],
    delta: Float[Tensor, "B t H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B t G S"],
    C: Float[Tensor, "B t G S"],
    group: Group,
    *,
    chunk: int = 64,
) -> Float[Tensor, "B t H D"]:
    """Run Mamba-2's recurrence over a sequence of which each rank holds a stretch.

    Each rank begins at zero; what the ranks before it leave then adds C_t times that state's rest,
    since the recurrence is linear. What is sent is one state for each rank before another.
    """
    out, state, decay = ssd(x, delta, A, B, C, chunk=chunk)
    left = (delta * A).to(state).sum(1).exp()
    before = states_before(state, left[..., None, None], group)
    read = torch.einsum("btgs,bghds->btghd", C.to(state), before.unflatten(1, (C.shape[2], -1)))
    return out + (read.flatten(2, 3) * decay[..., None]).to(x.dtype)
