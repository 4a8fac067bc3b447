# ruff: noqa: RUF005 -- Triton compiles no starred tuples
"""The kernels of the selective scan, in Triton (Mamba, 2312.00752, section 3.3.2).

A program is one warp; zoo.kernels.scan_lanes_triton says how its lanes share the channels' states,
which stay in registers while the tokens pass one after the other. The forward kernel saves the
state at the start of each block of tokens; the backward kernel takes the blocks from the last to
the first and recomputes the states inside. Where few sequences leave most of the GPU idle, the
tokens are also cut into segments, and a first pass computes what each hands on to the next.

No program adds to what another one writes: sums over programs are written part by part and added
in one order, so that a gradient is the same each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.available import num_multiprocessors
from zoo.kernels.scan_blocks_triton import run, run_back
from zoo.kernels.scan_lanes_triton import (
    T,
    deal,
    deal_both,
    find_channel,
    find_steps,
    fold,
    in_float32,
    kept_inside,
    load_states,
    load_tokens,
    moved,
    of_owner,
    of_pairs,
    share_of,
    start_of,
    store_all,
    store_all_states,
    store_folded,
    store_states,
    store_tokens,
    times,
    turn_of,
    turned,
    zeros,
)
from zoo.kernels.scan_shapes import BLOCK, padded_states, saved_states_shape
from zoo.kernels.sigmoid_triton import LOG2E
from zoo.kernels.sum_rows_triton import sum_rows, tiles_for

LN2 = tl.constexpr(0.6931471805599453)

# One compilation serves all sizes and strides, but for channels side by side: a lane reads one
# number at a time whatever they are.
STEPS = [f"{name}_c" for name in ("x", "delta", "B", "C", "dy", "v", "rows")]
SIZES = [name[:-1] + dim for name in STEPS for dim in "bt"]
SIZES += ["length", "chs", "segment", "count", "columns"]
POINTERS = ["x", "delta", "A", "B", "C", "D", "bias", "dy", "v", "rows", "ends", "y"]
POINTERS += [
    "saved_states",
    "dx",
    "ddelta",
    "dBC",
    "dchs",
    "parts",
    "dA",
    "dB",
    "dC",
    "dD",
    "dbias",
]
any_size = triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS + STEPS)


@triton.jit
def _hand_on(ends, b, channel, first, last, decay, chs, turn, NP: tl.constexpr, P: tl.constexpr):
    """What the segments from `first` up or down to `last`, not included, hand on to `last`.

    A segment's own part lies in the rows of `ends`, the sum of its steps in the row after. Lanes
    beyond the last channel are handed zeros.
    """
    c = tl.minimum(channel, chs - 1)
    state = zeros(NP // P)
    for i in range(tl.abs(last - first)):
        segment = tl.where(first > last, first - i, first + i)
        rows = ends + ((b * tl.num_programs(2) + segment) * (NP + 1)) * chs
        steps = tl.load(rows + NP * chs + c)
        own = load_states(rows, c, chs, turn, NP, P)
        joined = ()
        for j in tl.static_range(NP // P):
            entry = tl.exp2(steps * decay[j]) * state[j] + own[j]
            joined = joined + (tl.where(channel < chs, entry, 0.0),)
        state = joined
    return state


@any_size
def _segment_ends(
    v, v_b, v_t, v_c, delta, delta_b, delta_t, delta_c, A, rows, rows_b, rows_t, rows_c, bias,
    ends, length, chs, segment,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each segment alone hands on: its last state or, `REVERSE`, the gradient of its first.

    h = a h + Δ x B with `v` = x and `rows` = B; backward, g = a (g + dy C) with dy and C.
    """
    channel, c, decay, _, shift = find_channel(A, None, bias, chs, 0, N, NP, P, 1, 0)
    b = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * segment
    blocks = tl.cdiv(tl.minimum(begin + segment, length) - begin, T)
    state = zeros(NP // P)
    total = tl.zeros((32,), tl.float32)
    for k in range(blocks):
        first = begin + (blocks - 1 - k if REVERSE else k) * T
        left = length - first
        raw = load_tokens(start_of((delta, delta_b, delta_t, delta_c), b, first), c, left, P)
        inputs = load_tokens(start_of((v, v_b, v_t, v_c), b, first), c, left, P)
        dealt = deal(start_of((rows, rows_b, rows_t, rows_c), b, first), left, N, NP)
        raw = in_float32(raw, delta.dtype.element_ty)
        inputs = in_float32(inputs, v.dtype.element_ty)
        dealt = in_float32(dealt, rows.dtype.element_ty)
        steps = find_steps(raw, shift, P, SOFTPLUS)
        inputs = kept_inside(inputs, channel, left, chs, P) if REVERSE else times(steps, inputs, P)
        for s in tl.static_range(T // P):
            total += steps[s]
        for i in tl.static_range(T):
            step = of_owner(steps, T - 1 - i if REVERSE else i, P)
            u = of_owner(inputs, T - 1 - i if REVERSE else i, P)
            row = share_of(dealt, T - 1 - i if REVERSE else i, 0, NP, P)
            after = ()
            for j in tl.static_range(NP // P):
                a = tl.exp2(step * decay[j])
                entry = u * row[j]
                after = after + (a * (state[j] + entry) if REVERSE else a * state[j] + entry,)
            state = after
    out = ends + ((b * tl.num_programs(2) + tl.program_id(2)) * (NP + 1)) * chs
    store_states(out, state, channel, chs, 0, NP, P)
    total = fold((total,), 1, P // 2, 1)
    tl.store(out + NP * chs + channel, total, mask=channel < chs)


@triton.jit
def _all_moved(at, tokens):
    """The places of x, Δ, B and C so many tokens on."""
    return moved(at[0], tokens), moved(at[1], tokens), moved(at[2], tokens), moved(at[3], tokens)


@triton.jit
def _read(at, c, left, N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr):
    """The words of a block: x, Δ, and B with C."""
    x, delta = load_tokens(at[0], c, left, P), load_tokens(at[1], c, left, P)
    return x, delta, deal_both(at[2], at[3], left, N, NP)


@any_size
def _scan_forward(
    x, x_b, x_t, x_c, delta, delta_b, delta_t, delta_c, A, B, B_b, B_t, B_c, C, C_b, C_t, C_c,
    D, bias, ends, y, saved_states, length, chs, segment,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, SOFTPLUS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The outputs and, unless `saved_states` is None, the states that the blocks start from.

    A lane has `W` channels, so that B and C are handed round once for all of them: if no states
    are kept, two channels pay for handing them round in float32, ready for use.
    """
    PAIRED: tl.constexpr = W == 1 or saved_states is not None
    KINDS: tl.constexpr = (x.dtype.element_ty, delta.dtype.element_ty, B.dtype.element_ty)
    b = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * segment
    left = length - begin
    at = (
        of_pairs(start_of((x, x_b, x_t, x_c), b, begin), W),
        of_pairs(start_of((delta, delta_b, delta_t, delta_c), b, begin), W),
        start_of((B, B_b, B_t, B_c), b, begin),
        start_of((C, C_b, C_t, C_c), b, begin),
    )
    y += (b * length + begin) * chs
    if saved_states is not None:
        saved_states += (b * tl.cdiv(length, T) + begin // T) * NP * chs
    lanes = ()
    state = ()
    for k in tl.static_range(W):
        found = find_channel(A, D, bias, chs, 0, N, NP, P, W, k)
        channel, _, decay, _, _ = found
        entry = zeros(NP // P)
        if ends is not None:
            entry = _hand_on(ends, b, channel, 0, tl.program_id(2), decay, chs, 0, NP, P)
        lanes = lanes + (found,)
        state = state + (entry,)
    _, first, _, _, _ = lanes[0]
    mine = tl.minimum(segment, left)
    block = _read(at, first, left, N, NP, P)
    for i in range(mine // T):
        at = _all_moved(at, tl.where(i + 2 <= mine // T, T, 0))  # the next block, if it is whole
        ahead = _read(at, first, None, N, NP, P)
        if saved_states is not None:
            store_all_states(saved_states, state, lanes, chs, NP, P, W)
            saved_states += NP * chs
        state, outs = run(state, block, lanes, None, NP, P, W, SOFTPLUS, PAIRED, KINDS)
        store_all(y, outs, lanes[0][0], None, chs, P, W)
        y += T * chs
        block = ahead
    left = mine % T
    if left > 0:
        if mine > T:
            block = _read(_all_moved(at, T), first, left, N, NP, P)
        if saved_states is not None:
            store_all_states(saved_states, state, lanes, chs, NP, P, W)
        state, outs = run(state, block, lanes, left, NP, P, W, SOFTPLUS, PAIRED, KINDS)
        store_all(y, outs, lanes[0][0], left, chs, P, W)


@triton.jit
def _through_softplus(dsteps, dus, tokens, raw, shift, P: tl.constexpr, SOFTPLUS: tl.constexpr):
    """From the gradients of Δ A / ln 2 and Δ x, those of what the step sizes were made from."""
    drawn = ()
    for s in tl.static_range(T // P):
        draw = dsteps[s] * LN2 + dus[s] * tokens[s]
        if SOFTPLUS:
            draw = draw / (1 + tl.exp2((raw[s] + shift) * -LOG2E))
        drawn = drawn + (draw,)
    return drawn


@any_size
def _scan_backward(
    x, x_b, x_t, x_c, delta, delta_b, delta_t, delta_c, A, B, B_b, B_t, B_c, C, C_b, C_t, C_c,
    D, bias, dy, dy_b, dy_t, dy_c, saved_states, ends, dx, ddelta, dBC, dchs, length, chs, segment,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, SOFTPLUS: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """The gradients of x and Δ, and this program's parts of the others, to be summed.

    Only the last block may lack tokens, so what is read ahead is whole, unless all is `SHORT`.
    """
    turn = turn_of(NP, P)
    channel, c, decay, skip, shift = find_channel(A, D, bias, chs, turn, N, NP, P, 1, 0)
    b = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * segment
    blocks = tl.cdiv(tl.minimum(segment, length - begin), T)
    g = zeros(NP // P)
    if ends is not None:
        last = tl.num_programs(2) - 1
        g = _hand_on(ends, b, channel, last, tl.program_id(2), decay, chs, turn, NP, P)
    dA = zeros(NP // P)
    dD, dbias = zeros(2)
    first = begin + (blocks - 1) * T
    left = length - first
    x_at, dy_at = start_of((x, x_b, x_t, x_c), b, first), start_of((dy, dy_b, dy_t, dy_c), b, first)
    delta_at = start_of((delta, delta_b, delta_t, delta_c), b, first)
    B_at, C_at = start_of((B, B_b, B_t, B_c), b, first), start_of((C, C_b, C_t, C_c), b, first)
    saved_states += (b * tl.cdiv(length, T) + first // T) * NP * chs
    dx += (b * length + first) * chs
    ddelta += (b * length + first) * chs
    dBC += ((tl.program_id(0) * tl.num_programs(1) + b) * length + first) * 2 * NP
    tokens = load_tokens(x_at, c, left, P)
    raw = load_tokens(delta_at, c, left, P)
    dys = load_tokens(dy_at, c, left, P)
    dealt = deal_both(B_at, C_at, left, N, NP)
    start = load_states(saved_states, c, chs, 0, NP, P)
    for _ in range(blocks):
        back = tl.where(first > 0, T, 0)
        x_at, delta_at, dy_at = moved(x_at, -back), moved(delta_at, -back), moved(dy_at, -back)
        B_at, C_at = moved(B_at, -back), moved(C_at, -back)
        saved_states -= back // T * NP * chs
        ahead = left if SHORT else None
        next_tokens = load_tokens(x_at, c, ahead, P)
        next_raw = load_tokens(delta_at, c, ahead, P)
        next_dys = load_tokens(dy_at, c, ahead, P)
        next_dealt = deal_both(B_at, C_at, ahead, N, NP)
        next_start = load_states(saved_states, c, chs, 0, NP, P)
        tokens = in_float32(tokens, x.dtype.element_ty)
        raw = in_float32(raw, delta.dtype.element_ty)
        steps = find_steps(raw, shift, P, SOFTPLUS)
        kept = kept_inside(in_float32(dys, dy.dtype.element_ty), channel, left, chs, P)
        entry = turned(start, NP, P)
        g, dA, dus, dsteps, folded = run_back(
            g, dA, entry, steps, tokens, kept, dealt, decay, NP, P, B.dtype.element_ty
        )
        drawn = _through_softplus(dsteps, dus, tokens, raw, shift, P, SOFTPLUS)
        dxs = ()
        for s in tl.static_range(T // P):
            dD += kept[s] * tokens[s]
            dbias += drawn[s]
            dxs = dxs + (dus[s] * steps[s] + skip * kept[s],)
        store_tokens(dx, dxs, channel, left, chs, P)
        store_tokens(ddelta, drawn, channel, left, chs, P)
        store_folded(dBC, folded, left, NP, P)
        dx -= T * chs
        ddelta -= T * chs
        dBC -= T * 2 * NP
        first -= T
        left += T
        tokens = next_tokens
        raw = next_raw
        dys = next_dys
        dealt = next_dealt
        start = next_start
    out = dchs + (b * tl.num_programs(2) + tl.program_id(2)) * (NP + 2) * chs
    store_states(out, dA, channel, chs, turn, NP, P)
    dD = fold((dD,), 1, P // 2, 1)
    dbias = fold((dbias,), 1, P // 2, 1)
    tl.store(out + NP * chs + channel, dD, mask=channel < chs)
    tl.store(out + (NP + 1) * chs + channel, dbias, mask=channel < chs)


@any_size
def _sum_of_tokens(
    parts, dB, dC, count, columns,
    N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C, from parts with both of a token side by side."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = sum_rows(parts, column, count, columns, ROWS)
    entry = column % NP
    place = column // (2 * NP) * N + entry
    width = tl.where(column < columns, N, 0)
    of_C = column // NP % 2
    tl.store(dB + place, total.to(dB.dtype.element_ty), mask=entry < tl.where(of_C > 0, 0, width))
    tl.store(dC + place, total.to(dC.dtype.element_ty), mask=entry < tl.where(of_C > 0, width, 0))


@any_size
def _sum_of_channels(
    parts, dA, dD, dbias, count, chs,
    N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of A, D and the bias, from parts with a row of channels for each entry."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = sum_rows(parts, column, count, (NP + 2) * chs, ROWS)
    row, channel = column // chs, column % chs
    tl.store(dA + channel * N + row, total.to(dA.dtype.element_ty), mask=row < N)
    if dD is not None:
        tl.store(dD + channel, total.to(dD.dtype.element_ty), mask=row == NP)
    if dbias is not None:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), mask=row == NP + 1)


class ScanPlan(NamedTuple):
    """How a scan is laid out on the GPU."""

    lanes: int
    """Lanes that share a channel."""
    segments: int
    """Pieces that the tokens are cut into."""
    segment: int
    """Tokens of a segment, a whole number of blocks."""
    channels: int = 1
    """Channels that a lane takes at once, forward: 1, or 2 of 16 bits side by side in memory."""


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    save: bool,
    plan: ScanPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs and, with `save`, the states at the blocks' starts (else an empty tensor).

    Shapes as for `zoo.layers.scan.selective_scan`, in any strides.
    """
    batch, length, chs = x.shape
    states = padded_states(A.shape[1])
    plan = plan or plan_for(x, save=save, pairs=_in_pairs(x) and _in_pairs(delta))
    y = x.new_empty(batch, length, chs)
    saved_states = x.new_empty(saved_states_shape(x, A) if save else (0,), dtype=torch.float32)
    A, B, C, D, delta_bias = _as_read(A, B, C, D, delta_bias)
    if y.numel() == 0:
        return y, saved_states.zero_()
    sizes = _sizes(A, plan, delta_softplus)
    grid = (triton.cdiv(chs * plan.lanes, 32), batch, plan.segments)
    ends = None
    if plan.segments > 1:
        ends = x.new_empty(batch, plan.segments, states + 1, chs, dtype=torch.float32)
        _segment_ends[grid](
            *_strided(x), *_strided(delta), A, *_strided(B), delta_bias, ends,
            length, chs, plan.segment, **sizes, REVERSE=False,
        )  # fmt: skip
    grid = (triton.cdiv(chs * plan.lanes, 32 * plan.channels), batch, plan.segments)
    _scan_forward[grid](
        *_strided(x), *_strided(delta), A, *_strided(B), *_strided(C), D, delta_bias, ends,
        y, saved_states if save else None, length, chs, plan.segment, **sizes, W=plan.channels,
    )  # fmt: skip
    return y, saved_states


def backward(
    dy: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    saved_states: Tensor,
    *,
    delta_softplus: bool,
    plan: ScanPlan | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, Δ, A, B, C, D and the bias, each in the dtype of its input."""
    batch, length, chs = x.shape
    likes = A, B, C, D, delta_bias
    states = padded_states(A.shape[1])
    plan = plan or plan_for(x, back=True)
    A, B, C, D, delta_bias = _as_read(A, B, C, D, delta_bias)
    grid = (triton.cdiv(chs * plan.lanes, 32), batch, plan.segments)
    dx = x.new_empty(batch, length, chs)
    ddelta = delta.new_empty(batch, length, chs)
    dBC = x.new_empty(grid[0], batch, length, 2 * states, dtype=torch.float32)
    dchs = x.new_empty(batch * plan.segments, states + 2, chs, dtype=torch.float32)
    sizes = _sizes(A, plan, delta_softplus)
    ends = None
    if plan.segments > 1:
        ends = x.new_empty(batch, plan.segments, states + 1, chs, dtype=torch.float32)
        _segment_ends[grid](
            *_strided(dy), *_strided(delta), A, *_strided(C), delta_bias, ends,
            length, chs, plan.segment, **sizes, REVERSE=True,
        )  # fmt: skip
    _scan_backward[grid](
        *_strided(x), *_strided(delta), A, *_strided(B), *_strided(C), D, delta_bias, *_strided(dy),
        saved_states, ends, dx, ddelta, dBC, dchs, length, chs, plan.segment, **sizes,
        SHORT=length < BLOCK,
    )  # fmt: skip
    dA, dB, dC, dD, dbias = (_like(t) for t in likes)
    columns, tiles = batch * length * 2 * states, tiles_for(grid[0])
    _sum_of_tokens[(triton.cdiv(columns, tiles["COLS"]),)](
        dBC, dB, dC, grid[0], columns, N=sizes["N"], NP=states, **tiles
    )
    columns, tiles = (states + 2) * chs, tiles_for(len(dchs))
    _sum_of_channels[(triton.cdiv(columns, tiles["COLS"]),)](
        dchs, dA, dD, dbias, len(dchs), chs, N=sizes["N"], NP=states, **tiles
    )
    empty = x.new_empty(0)
    return dx, ddelta, dA, dB, dC, empty if dD is None else dD, empty if dbias is None else dbias


def _like(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.new_empty(t.shape)


def plan_for(x: Tensor, *, save: bool = False, pairs: bool = False, back: bool = False) -> ScanPlan:
    """Lay out the scan of `x` so that every scheduler of the GPU has warps to run.

    The limits are those that were fastest on an H200. Forward, fewer lanes a channel and two
    channels a lane shuffle less, but a scheduler with one or two warps cannot hide their latency.
    Backward, two lanes a channel take so many registers that a scheduler holds two warps at most:
    they are faster only where there are no more warps than that.

    Args:
        save: The states are saved.
        pairs: Channels may be taken in pairs.
        back: For the backward kernel.
    """
    batch, length, chs = x.shape
    num = 4 * num_multiprocessors(x.device)  # schedulers
    warps = batch * triton.cdiv(chs, 32)
    channels = 1
    if back:
        lanes = 2 if num <= 2 * warps <= 2 * num else 4
    elif pairs and warps >= 2.75 * num:
        lanes, channels = 2, 2
    elif pairs and save and 2 * warps >= num:
        lanes, channels = 4, 2
    else:
        lanes = 2 if 2 * warps >= 2.5 * num else 4
    wanted = min(triton.cdiv(4 * num, lanes * warps), length // (16 * BLOCK))
    if lanes * warps >= num or wanted < 2:
        return ScanPlan(lanes, 1, triton.cdiv(length, BLOCK) * BLOCK, channels)
    segment = triton.cdiv(length, wanted * BLOCK) * BLOCK
    return ScanPlan(lanes, triton.cdiv(length, segment), segment, channels)


def _sizes(A: Tensor, plan: ScanPlan, delta_softplus: bool) -> dict[str, int]:
    return dict(
        N=A.shape[1],
        NP=padded_states(A.shape[1]),
        P=plan.lanes,
        SOFTPLUS=delta_softplus,
        num_warps=1,
    )


def _in_pairs(t: Tensor) -> bool:
    """Whether channels lie in pairs that can be read as words of 32 bits."""
    size, steps = t.shape[-1], t.stride()
    even = not any(n % 2 for n in (size, *steps[:-1]))
    return t.element_size() == 2 and steps[-1] == 1 and even and t.data_ptr() % 4 == 0


def _strided(t: Tensor) -> tuple[Tensor | int, ...]:
    """Return a sequence and its strides; a copy if a block spans more bytes than 32 bits count."""
    _, token, channel = t.stride()
    if (BLOCK * token + t.shape[-1] * channel) * t.element_size() >= 2**31:
        t = t.contiguous()
    return (t, *t.stride())


def _as_read(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the small operands in the layout that the kernels read; copies only where needed."""
    if B.dtype != C.dtype:
        B, C = B.float(), C.float()
    D, delta_bias = (None if t is None else t.contiguous() for t in (D, delta_bias))
    return A.float().contiguous(), B, C, D, delta_bias
