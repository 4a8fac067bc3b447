"""Losses over a vocabulary, chunk by chunk: the logits of a whole batch never exist.

A vocabulary of 128,256 at 8,192 tokens is 4.2 GB of float32 for one side of one loss, and autograd
would keep several. So each chunk of rows makes its logits, its loss and the gradient of its logits
in the forward pass, multiplies that gradient into those of the hidden states and of the head, and
forgets it; the backward pass only scales them. Every loss is a sum over the tokens that count.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]
Sides = Callable[[slice], tuple[Any, ...]]
"""Of some rows: what their logits are compared with."""

GROUP = 4
"""Chunks whose logit gradients are multiplied into the head's at once: each such product reads and
writes all of it."""


def kl(
    ours: Float[Tensor, "n D"],
    head: Float[Tensor, "V D"],
    theirs: Float[Tensor, "n C"],
    their_head: Float[Tensor, "V C"],
    counted: Bool[Tensor, " n"],
    *,
    tau: float = 1.0,
    chunk: int = 1024,
    kind: Kind = "forward",
    top_k: int = 0,
) -> Float[Tensor, ""]:
    """Sum the divergence of the student's next tokens from the teacher's (2407.14679, section 3.2).

        L = τ² Σ KL(p_t ‖ p_s),    p = softmax(z / τ),    ∂L/∂z_s = τ (p_s − p_t)

    `reverse` is KL(p_s ‖ p_t), `jsd` half of each side's divergence from their mean (GKD,
    2306.13649). The gradients reach `ours` and `head`; the teacher gets none.

    Args:
        ours: The student's last hidden states, one row a token.
        head: Its output embedding; the teacher's has as many rows, for the same vocabulary.
        counted: The tokens that count; padding does not.
        tau: Temperature of both sides.
        chunk: Rows whose logits exist at a time.
        top_k: If above 0, only the teacher's so many likeliest tokens are compared one by one; all
            others are one token with the rest of the probability on either side. That is a lower
            bound of the whole divergence, and equal to it for k = V.
    """
    if len(head) != len(their_head):
        raise ValueError(
            f"The student's vocabulary has {len(head)} rows and the teacher's {len(their_head)}; "
            "a divergence compares equal vocabularies: cut both heads to the rows that they share."
        )
    if not tau > 0:
        raise ValueError(f"tau is {tau}; a temperature is above 0.")
    if top_k and kind != "forward":
        raise ValueError(f"top_k is {top_k}, for the forward divergence; kind is {kind}.")
    theirs, their_head = theirs.detach(), their_head.detach().to(theirs.dtype)

    def sides(part: slice) -> tuple[Any, ...]:
        logits = _logits(theirs[part], their_head)
        return (logits, tau, min(top_k, len(head))) if top_k else (logits, tau)

    return _Chunked.apply(ours, head, counted, "top_k" if top_k else kind, sides, chunk)


def cross_entropy(
    ours: Float[Tensor, "n D"],
    head: Float[Tensor, "V D"],
    ids: Int[Tensor, " n"],
    counted: Bool[Tensor, " n"],
    *,
    chunk: int = 1024,
) -> Float[Tensor, ""]:
    """Sum the cross-entropy of the tokens that follow, in nats.

    Args:
        ids: The token after each row; any valid one where `counted` is false.
    """
    return _Chunked.apply(ours, head, counted, "labels", lambda part: (ids[part],), chunk)


class _Chunked(torch.autograd.Function):
    """The sum over counted rows of a loss of `hidden @ head.T`, with its gradients made at once."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, counted: Tensor, kind: str, sides: Sides, chunk: int
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        rows = _rows(kind, hidden.is_cuda)
        with torch.autocast(hidden.device.type, enabled=False):
            weight, wide = head.to(hidden.dtype), _wide(hidden)
            total = hidden.new_zeros((), dtype=wide)
            d_hidden = torch.empty_like(hidden) if wants_hidden else None
            d_head = torch.zeros_like(head, dtype=wide) if wants_head else None
            kept = hidden.new_empty(min(len(hidden), GROUP * chunk), len(head))
            for first in range(0, len(hidden), len(kept)):
                group = hidden[first : first + len(kept)]
                for at in range(0, len(group), chunk):
                    part = slice(first + at, first + min(at + chunk, len(group)))
                    gradient = kept[at : at + part.stop - part.start]
                    total += rows(
                        _logits(hidden[part], weight), counted[part], gradient, *sides(part)
                    )
                    if d_hidden is not None:
                        torch.mm(gradient, weight, out=d_hidden[part])
                if d_head is not None:
                    _add_product(d_head, kept[: len(group)], group)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        d_hidden, d_head = ctx.saved_tensors
        scaled = (
            None if d is None else d.mul_(grad_outputs[0].to(d.dtype)) for d in (d_hidden, d_head)
        )
        return *scaled, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "n V"]:
    """Multiply in the operands' precision and return float32 at least: bf16 has 3 digits."""
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).to(_wide(hidden))


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add `gradient.T @ hidden` to `total`, which is float32 at least."""
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        torch.addmm(total, gradient.T, hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(gradient.T.to(total.dtype), hidden.to(total.dtype))


def _forward(ours: Tensor, theirs: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    log_s, log_t = (ours / tau).log_softmax(-1), (theirs / tau).log_softmax(-1)
    p_t = log_t.exp()
    return tau**2 * (p_t * (log_t - log_s)).sum(-1), tau * (log_s.exp() - p_t)


def _top_k(ours: Tensor, theirs: Tensor, tau: float, k: int) -> tuple[Tensor, Tensor]:
    log_s = (ours / tau).log_softmax(-1)
    log_t, kept = (theirs / tau).log_softmax(-1).topk(k)
    p_t, p_s = log_t.exp(), log_s.exp()
    others = p_s.scatter(1, kept, 0.0)
    rest, rest_s = (1 - p_t.sum(-1)).clamp_min(0), others.sum(-1)
    share = rest / rest_s.clamp_min(torch.finfo(ours.dtype).tiny)
    loss = (p_t * (log_t - log_s.gather(1, kept))).sum(-1) + torch.xlogy(rest, share)
    gradient = (p_s - others * share[:, None]).scatter_add(1, kept, -p_t)
    return tau**2 * loss, tau * gradient


def _reverse(ours: Tensor, theirs: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    log_s, log_t = (ours / tau).log_softmax(-1), (theirs / tau).log_softmax(-1)
    p_s, gap = log_s.exp(), log_s - log_t
    loss = (p_s * gap).sum(-1)
    return tau**2 * loss, tau * p_s * (gap - loss[:, None])


def _jsd(ours: Tensor, theirs: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    log_s, log_t = (ours / tau).log_softmax(-1), (theirs / tau).log_softmax(-1)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    p_s, gap = log_s.exp(), log_s - log_m
    loss = (p_s * gap).sum(-1)
    other = (log_t.exp() * (log_t - log_m)).sum(-1)
    return tau**2 * (loss + other) / 2, tau * p_s * (gap - loss[:, None]) / 2


def _labels(ours: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_s = ours.log_softmax(-1)
    loss = -log_s.gather(1, ids[:, None]).squeeze(1)
    chosen = torch.arange(ours.shape[-1], device=ids.device) == ids[:, None]
    return loss, log_s.exp() - chosen.to(ours.dtype)


ROWS = dict(forward=_forward, reverse=_reverse, jsd=_jsd, top_k=_top_k, labels=_labels)
"""Of the logits [n V] of some rows, and what they are compared with: each row's loss, [n], and its
gradient by the logits, [n V]."""


@cache
def _rows(kind: str, compiled: bool) -> Callable[..., Tensor]:
    """Return the sum of a loss over the rows that count; its gradient is written where it is kept.

    Args:
        compiled: For CUDA, where each pass over the logits costs milliseconds.
    """

    def rows(logits: Tensor, counted: Tensor, kept: Tensor, *sides: Any) -> Tensor:
        loss, gradient = ROWS[kind](logits, *sides)
        kept.copy_(torch.where(counted[:, None], gradient, 0))
        return torch.where(counted, loss, 0).sum()

    return torch.compile(rows) if compiled else rows
