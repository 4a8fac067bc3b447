# ruff: noqa: RUF005 -- Triton compiles no starred tuples
"""The kernels of the convolution over three tokens, in Triton.

Each lane walks a few tokens of one window for a few channels, with what neighbours share in its
registers, so that each token is read once (and again at the ends of a walk). Lanes are dealt out
over walks and channels together, so that none is idle. The gradient of the taps is written
part by part and added up in one order, so that it is the same each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.sigmoid_triton import sigmoid
from zoo.kernels.sum_rows_triton import sum_rows, tiles_for

WALK = 16
"""Most tokens of a walk."""

WINDOWS = 4
"""Windows of a program in the backward pass: several, so that there are fewer parts to add up."""

FORWARD, BACKWARD = 512, 256
"""Channels of a program of four warps: fewer a lane where each needs more registers."""


# One compilation serves all batches.
any_size = triton.jit(do_not_specialize=["length", "windows", "count", "chs"])


@triton.jit
def _find(HALF: tl.constexpr, WALKS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Each lane's walk, its first token, its channel in this half, and whether there is one."""
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    walk = lane // HALF
    return walk, walk * LENGTH, lane % HALF, walk < WALKS


@triton.jit
def _taps_of(taps, channel, inside):
    """The three taps of each lane's channel."""
    before = tl.load(taps + channel * 3, mask=inside, other=0.0).to(tl.float32)
    here = tl.load(taps + channel * 3 + 1, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(taps + channel * 3 + 2, mask=inside, other=0.0).to(tl.float32)
    return before, here, after


@triton.jit
def _tokens(place, stride, first, limit, MORE: tl.constexpr, LENGTH: tl.constexpr):
    """The tokens of a walk and `MORE` on each side, from `place`; zeros outside the window."""
    tokens = ()
    for i in tl.static_range(-MORE, LENGTH + MORE):
        token = tl.where(first + i < 0, limit, first + i)
        read = tl.load(place + i * stride, mask=token < limit, other=0.0)
        tokens = tokens + (read.to(tl.float32),)
    return tokens


@triton.jit
def _walk_forward(
    x, taps, y, length, HALF: tl.constexpr, WALKS: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One half of the channels forward."""
    _, first, channel, inside = _find(HALF, WALKS, LENGTH, BLOCK)
    before, here, after = _taps_of(taps, channel, inside)
    limit = tl.where(inside, length, 0)
    row = tl.program_id(0).to(tl.int64) * length + first
    tokens = _tokens(x + row * (2 * HALF) + channel, 2 * HALF, first, limit, 1, LENGTH)
    for i in tl.static_range(LENGTH):
        v = tokens[i] * before + tokens[i + 1] * here + tokens[i + 2] * after
        v *= sigmoid(v)
        place = y + row * HALF + channel + i * HALF
        tl.store(place, v.to(y.dtype.element_ty), mask=first + i < limit)


@any_size
def _short_conv_forward(
    x, taps, first, last, length,
    HALF: tl.constexpr, WALKS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both halves, a program each."""
    if tl.program_id(2) == 0:
        _walk_forward(x, taps, first, length, HALF, WALKS, LENGTH, BLOCK)
    else:
        _walk_forward(x + HALF, taps + 3 * HALF, last, length, HALF, WALKS, LENGTH, BLOCK)


@triton.jit
def _walk_back(
    x, taps, dy, dx, parts, length, windows, DY_B: tl.constexpr, DY_T: tl.constexpr,
    HALF: tl.constexpr, WALKS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """One half of the channels backward: x's gradient, and parts of the taps'."""
    walk, first, channel, inside = _find(HALF, WALKS, LENGTH, BLOCK)
    before, here, after = _taps_of(taps, channel, inside)
    dbefore = tl.zeros((BLOCK,), tl.float32)
    dhere = tl.zeros((BLOCK,), tl.float32)
    dafter = tl.zeros((BLOCK,), tl.float32)
    for k in range(WINDOWS):
        window = tl.program_id(0).to(tl.int64) * WINDOWS + k
        limit = tl.where(inside, tl.where(window < windows, length, 0), 0)
        place = (window * length + first) * (2 * HALF) + channel
        tokens = _tokens(x + place, 2 * HALF, first, limit, 2, LENGTH)
        dys = _tokens(dy + window * DY_B + first * DY_T + channel, DY_T, first, limit, 1, LENGTH)
        dvs = ()
        for i in tl.static_range(LENGTH + 2):
            v = tokens[i] * before + tokens[i + 1] * here + tokens[i + 2] * after
            gate = sigmoid(v)
            dvs = dvs + (dys[i] * gate * (1 + v * (1 - gate)),)
        for i in tl.static_range(LENGTH):
            dbefore += dvs[i + 1] * tokens[i + 1]
            dhere += dvs[i + 1] * tokens[i + 2]
            dafter += dvs[i + 1] * tokens[i + 3]
            dv = dvs[i + 2] * before + dvs[i + 1] * here + dvs[i] * after
            store = dx + place + i * (2 * HALF)
            tl.store(store, dv.to(dx.dtype.element_ty), mask=first + i < limit)
    part = parts + (tl.program_id(0) * WALKS + walk).to(tl.int64) * (6 * HALF) + channel
    tl.store(part, dbefore, mask=inside)
    tl.store(part + 2 * HALF, dhere, mask=inside)
    tl.store(part + 4 * HALF, dafter, mask=inside)


@any_size
def _short_conv_backward(
    x, taps, dfirst, dlast, dx, parts, length, windows,
    FIRST_B: tl.constexpr, FIRST_T: tl.constexpr, LAST_B: tl.constexpr, LAST_T: tl.constexpr,
    HALF: tl.constexpr, WALKS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Both halves, a program each."""
    if tl.program_id(2) == 0:
        _walk_back(
            x, taps, dfirst, dx, parts,
            length, windows, FIRST_B, FIRST_T, HALF, WALKS, LENGTH, BLOCK, WINDOWS,
        )  # fmt: skip
    else:
        _walk_back(
            x + HALF, taps + 3 * HALF, dlast, dx + HALF, parts + HALF,
            length, windows, LAST_B, LAST_T, HALF, WALKS, LENGTH, BLOCK, WINDOWS,
        )  # fmt: skip


@any_size
def _sum_of_taps(parts, dtaps, count, chs, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The gradient of the taps, from rows of one tap of all channels after the other."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = sum_rows(parts, column, count, 3 * chs, ROWS)
    place = dtaps + column % chs * 3 + column // chs
    tl.store(place, total.to(dtaps.dtype.element_ty), mask=column < 3 * chs)


def _sizes(x: Tensor, block: int) -> dict[str, int]:
    walks = triton.cdiv(x.shape[1], WALK)
    length = triton.cdiv(x.shape[1], walks)
    walks = triton.cdiv(x.shape[1], length)
    return dict(HALF=x.shape[2] // 2, WALKS=walks, LENGTH=length, BLOCK=block)


def forward(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operator's two halves, from contiguous [windows tokens channels], [channels 3]."""
    windows, length, chs = x.shape
    first, last = (x.new_empty(windows, length, chs // 2) for _ in range(2))
    if first.numel() == 0:
        return first, last
    sizes = _sizes(x, FORWARD)
    grid = (windows, triton.cdiv(sizes["WALKS"] * (chs // 2), FORWARD), 2)
    _short_conv_forward[grid](x, taps, first, last, length, **sizes)
    return first, last


def backward(dfirst: Tensor, dlast: Tensor, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and the taps, each in its dtype."""
    windows, length, chs = x.shape
    dx, dtaps = x.new_empty(x.shape), taps.new_empty(taps.shape)
    if x.numel() == 0:
        return dx, dtaps.zero_()
    dfirst, dlast = (t if t.stride(2) == 1 else t.contiguous() for t in (dfirst, dlast))
    sizes = _sizes(x, BACKWARD)
    groups = triton.cdiv(windows, WINDOWS)
    parts = x.new_empty(groups * sizes["WALKS"], 3, chs, dtype=torch.float32)
    grid = (groups, triton.cdiv(sizes["WALKS"] * (chs // 2), BACKWARD), 2)
    _short_conv_backward[grid](
        x, taps, dfirst, dlast, dx, parts, length, windows,
        *dfirst.stride()[:2], *dlast.stride()[:2], **sizes, WINDOWS=WINDOWS,
    )  # fmt: skip
    tiles = tiles_for(parts.shape[0])
    _sum_of_taps[(triton.cdiv(3 * chs, tiles["COLS"]),)](parts, dtaps, len(parts), chs, **tiles)
    return dx, dtaps
