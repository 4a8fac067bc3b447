# ruff: noqa: RUF005 -- Triton compiles no starred tuples
"""The kernel of StripedHyena 2's short convolutions and their gates, in Triton.

Projections [B, T, channels x 3] are read once: each lane walks over some tokens of one channel with
what it still needs of those before in its registers, convolves x2, x1 and v over three tokens each,
and multiplies. What comes out is x2 and x1 v, or, with an explicit filter of a few taps, all of the
operator SE. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WALK = 32
"""Tokens of a walk; those before it that are read again are two and what the filter looks back."""
BLOCK = 256
"""Channels of a program of four warps."""


@triton.jit
def _three(place, inside):
    """The three numbers of each lane's channel, which stand together."""
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
    third = tl.load(place + 2, mask=inside, other=0.0).to(tl.float32)
    return first, second, third


@triton.jit(do_not_specialize=["length"])
def _gated_conv(
    p, taps, g, x2s, out, length,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, TAPS: tl.constexpr, FILTERS: tl.constexpr,
    WALK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One walk of one block of channels, in one row of the batch."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < WIDTH
    limit = tl.where(inside, length, 0)
    start = tl.program_id(0) * WALK - (TAPS - 1)
    rows = tl.program_id(2).to(tl.int64) * length
    a2, b2, c2 = _three(taps + channel * 9, inside)  # before last, last, present
    a1, b1, c1 = _three(taps + channel * 9 + 3, inside)
    a0, b0, c0 = _three(taps + channel * 9 + 6, inside)
    weights = ()
    for j in tl.static_range(TAPS * FILTERS):
        weight = tl.load(g + channel // GROUP * TAPS + j, mask=inside, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    columns = p + channel * 3
    t = start - 2
    here = tl.where(t < 0, limit, t) < limit
    older2, older1, older0 = _three(columns + (rows + t) * (3 * WIDTH), here)
    t = start - 1
    here = tl.where(t < 0, limit, t) < limit
    old2, old1, old0 = _three(columns + (rows + t) * (3 * WIDTH), here)
    us = ()
    for i in tl.static_range(WALK + TAPS - 1):
        t = start + i
        here = tl.where(t < 0, limit, t) < limit
        new2, new1, new0 = _three(columns + (rows + t) * (3 * WIDTH), here)
        u = (a1 * older1 + b1 * old1 + c1 * new1) * (a0 * older0 + b0 * old0 + c0 * new0)
        us = us + (u,)
        if i >= TAPS - 1:
            x2 = a2 * older2 + b2 * old2 + c2 * new2
            place = (rows + t) * WIDTH + channel
            if FILTERS:
                y = us[i] * weights[0]
                for j in tl.static_range(1, TAPS):
                    y += us[i - j] * weights[j]
                tl.store(out + place, (x2 * y).to(out.dtype.element_ty), mask=here)
            else:
                tl.store(x2s + place, x2.to(x2s.dtype.element_ty), mask=here)
                tl.store(out + place, u.to(out.dtype.element_ty), mask=here)
        older2, older1, older0 = old2, old1, old0
        old2, old1, old0 = new2, new1, new0


def _launch(p: Tensor, taps: Tensor, g: Tensor | None, x2: Tensor, out: Tensor) -> None:
    batch, length, width = out.shape
    if not out.numel():
        return
    sizes = dict(
        WIDTH=width,
        GROUP=1 if g is None else width // g.shape[0],
        TAPS=1 if g is None else g.shape[1],
        FILTERS=int(g is not None),
        WALK=min(WALK, triton.next_power_of_2(length)),
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
    )
    grid = (triton.cdiv(length, sizes["WALK"]), triton.cdiv(width, sizes["BLOCK"]), batch)
    _gated_conv[grid](p, taps, taps if g is None else g, x2, out, length, **sizes)


def gates(p: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return x2 and x1 v, from contiguous [B, T, 3 W] and taps of [3 W, 3], the present last."""
    x2, u = (p.new_empty(*p.shape[:2], p.shape[2] // 3) for _ in range(2))
    _launch(p, taps, None, x2, u)
    return x2, u


def filtered(p: Tensor, taps: Tensor, g: Tensor) -> Tensor:
    """Return x2 (g * (x1 v)) with filters [G, K], the present first."""
    out = torch.empty(*p.shape[:2], p.shape[2] // 3, dtype=p.dtype, device=p.device)
    _launch(p, taps, g, out, out)
    return out
