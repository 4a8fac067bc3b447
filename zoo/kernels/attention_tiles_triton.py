"""Attention with a bias inside windows of more than 64 tokens, in Triton.

Logits are computed in tiles, as in FlashAttention-2 (2307.08691): the forward kernel keeps the
logsumexp of each row, from which the backward kernels recompute the probabilities. Unlike torch's
kernels these never write a gradient of [windows heads N N]: a program sums the gradient of its rows
of the bias over its windows, and the programs' sums are added in one order, so that the result is
the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.available import num_multiprocessors, shared_memory
from zoo.kernels.sigmoid_triton import LOG2E

TILES: dict[str, dict[str, int]] = dict(
    forward=dict(ROWS=64, COLS=32, num_warps=4, num_stages=3),
    queries=dict(ROWS=64, COLS=32, num_warps=4, num_stages=3),
    keys=dict(ROWS=64, COLS=64, num_warps=4, num_stages=3),
    bias=dict(ROWS=128, COLS=128, num_warps=8, num_stages=2),
    bias_in_little=dict(ROWS=64, COLS=64, num_warps=4, num_stages=2),
)
"""Queries and keys of a tile in each kernel, and how it is compiled: the fastest on an H200.

`bias_in_little` is for GPUs with less shared memory than Hopper's.
"""

HOPPER_MEMORY = 227 << 10
"""Bytes of shared memory that a program may take on a Hopper GPU."""


@triton.jit
def _load_some(part, token, N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr):
    channel = tl.arange(0, W)
    inside = (token < N)[:, None] & (channel < D)[None, :]
    return tl.load(part + (token[:, None] * STEP + channel[None, :]), mask=inside, other=0.0)


@triton.jit
def _load(
    part, token,
    N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head, zeros where there are none; they lie `STEP` apart.

    Widths of tiles are powers of two: a head of 96 channels is [tokens 64] and [tokens 32].
    """
    found = (_load_some(part, token, N, D, STEP, MAIN),)
    if REST:
        found += (_load_some(part + MAIN, token, N, D - MAIN, STEP, REST),)
    return found


@triton.jit
def _store(part, token, x, N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):
    for i in tl.static_range(len(x)):
        channel = x[0].shape[1] * i + tl.arange(0, x[i].shape[1])
        inside = (token < N)[:, None] & (channel < D)[None, :]
        place = part + (token[:, None] * STEP + channel[None, :])
        tl.store(place, x[i].to(part.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(T: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    zeros = (tl.zeros((T, MAIN), tl.float32),)
    if REST:
        zeros += (tl.zeros((T, REST), tl.float32),)
    return zeros


@triton.jit
def _compare(x, y, total=None):
    """Each of `x` times each of `y`, added to `total`."""
    total = tl.dot(x[0], tl.trans(y[0]), total)
    for i in tl.static_range(1, len(x)):
        total = tl.dot(x[i], tl.trans(y[i]), total)
    return total


@triton.jit
def _mix(p, x, total):
    """Sums of `x`, weighed with each row of `p`, added to `total`."""
    found = (tl.dot(p, x[0], total[0]),)
    for i in tl.static_range(1, len(x)):
        found += (tl.dot(p, x[i], total[i]),)
    return found


@triton.jit
def _row_products(x, y):
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit
def _logits(q, k, bias, row, col, scale, N: tl.constexpr):
    """Logits in units of 1 / log2(e), -inf where there is no such query or key."""
    inside = (row < N)[:, None] & (col < N)[None, :]
    place = bias + row[:, None] * N + col[None, :]
    added = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    return _compare(q, k) * (scale * LOG2E) + added * LOG2E


@triton.jit
def _tiles_forward(
    qkv, bias, out, logsumexp, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The result and, in `logsumexp`, the base-2 logarithm of each row's sum of exponentials."""
    head, window = tl.program_id(1), tl.program_id(2).to(tl.int64)
    STEP: tl.constexpr = 3 * HEADS * D
    part = qkv + window * (N * STEP) + head * D
    bias += head * (N * N)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _load(part, row, N, D, STEP, MAIN, REST)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = _zeros(ROWS, MAIN, REST)
    for first in range(0, N, COLS):
        col = first + tl.arange(0, COLS)
        k = _load(part + HEADS * D, col, N, D, STEP, MAIN, REST)
        v = _load(part + 2 * HEADS * D, col, N, D, STEP, MAIN, REST)
        logits = _logits(q, k, bias, row, col, scale, N)
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(p, 1)
        mixed = _mix(p.to(qkv.dtype.element_ty), v, [x * shrunk[:, None] for x in mixed])
        highest = higher
    mixed = [x / total[:, None] for x in mixed]
    _store(out + window * (N * HEADS * D) + head * D, row, mixed, N, D, HEADS * D)
    tl.store(logsumexp + (window * HEADS + head) * N + row, highest + tl.log2(total), mask=row < N)


@triton.jit
def _backward_keys(
    dout, qkv, bias, logsumexp, dots, dqkv, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values; tiles of logits are [keys, queries] here."""
    head, window = tl.program_id(1), tl.program_id(2).to(tl.int64)
    STEP: tl.constexpr = 3 * HEADS * D
    part, dpart = qkv + window * (N * STEP) + head * D, dqkv + window * (N * STEP) + head * D
    dout += window * (N * HEADS * D) + head * D
    bias += head * (N * N)
    logsumexp += (window * HEADS + head) * N
    dots += (window * HEADS + head) * N
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    k = _load(part + HEADS * D, col, N, D, STEP, MAIN, REST)
    v = _load(part + 2 * HEADS * D, col, N, D, STEP, MAIN, REST)
    dk = _zeros(COLS, MAIN, REST)
    dv = _zeros(COLS, MAIN, REST)
    for first in range(0, N, ROWS):
        row = first + tl.arange(0, ROWS)
        q = _load(part, row, N, D, STEP, MAIN, REST)
        do = _load(dout, row, N, D, HEADS * D, MAIN, REST)
        row_logs = tl.load(logsumexp + row, mask=row < N, other=float("inf"))  # no probability
        row_dots = tl.load(dots + row, mask=row < N, other=0.0)
        inside = (col < N)[:, None] & (row < N)[None, :]
        added = tl.load(bias + row[None, :] * N + col[:, None], mask=inside, other=0.0)
        # Products are summed upon what is added to them, which takes fewer registers.
        logits = _compare(k, q, added.to(tl.float32) * (1 / scale)) * (scale * LOG2E)
        p = tl.exp2(logits - row_logs[None, :])
        ds = p * _compare(v, do, tl.broadcast_to(-row_dots[None, :], (COLS, ROWS)))
        dv = _mix(p.to(qkv.dtype.element_ty), do, dv)
        dk = _mix((ds * scale).to(qkv.dtype.element_ty), q, dk)
    _store(dpart + HEADS * D, col, dk, N, D, STEP)
    _store(dpart + 2 * HEADS * D, col, dv, N, D, STEP)


@triton.jit
def _backward_queries(
    dout, qkv, bias, logsumexp, out, dots, dqkv, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of queries; and dout · out of each of them, in `dots`."""
    head, window = tl.program_id(1), tl.program_id(2).to(tl.int64)
    STEP: tl.constexpr = 3 * HEADS * D
    part = qkv + window * (N * STEP) + head * D
    mine = window * (N * HEADS * D) + head * D
    bias += head * (N * N)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = (window * HEADS + head) * N + row
    q = _load(part, row, N, D, STEP, MAIN, REST)
    do = _load(dout + mine, row, N, D, HEADS * D, MAIN, REST)
    row_dots = _row_products(do, _load(out + mine, row, N, D, HEADS * D, MAIN, REST))
    tl.store(dots + rows, row_dots, mask=row < N)
    row_logs = tl.load(logsumexp + rows, mask=row < N, other=0.0)
    dq = _zeros(ROWS, MAIN, REST)
    for first in range(0, N, COLS):
        col = first + tl.arange(0, COLS)
        k = _load(part + HEADS * D, col, N, D, STEP, MAIN, REST)
        v = _load(part + 2 * HEADS * D, col, N, D, STEP, MAIN, REST)
        logits = _logits(q, k, bias, row, col, scale, N)
        ds = tl.exp2(logits - row_logs[:, None]) * (_compare(do, v) - row_dots[:, None])
        dq = _mix((ds * scale).to(qkv.dtype.element_ty), k, dq)
    _store(dqkv + window * (N * STEP) + head * D, row, dq, N, D, STEP)


@triton.jit
def _backward_bias(
    dout, qkv, bias, logsumexp, dots, dbias, scale, windows,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the bias, summed over this program's windows."""
    TILES: tl.constexpr = (N + COLS - 1) // COLS
    STEP: tl.constexpr = 3 * HEADS * D
    head = tl.program_id(1)
    row = tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % TILES * COLS + tl.arange(0, COLS)
    inside = (row < N)[:, None] & (col < N)[None, :]
    place = row[:, None] * N + col[None, :]
    added = tl.load(bias + head * (N * N) + place, mask=inside, other=-float("inf"))
    added = added.to(tl.float32) * (1 / scale)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for window in range(tl.program_id(2).to(tl.int64), windows, tl.num_programs(2)):
        part = qkv + window * (N * STEP) + head * D
        rows = (window * HEADS + head) * N + row
        q = _load(part, row, N, D, STEP, MAIN, REST)
        k = _load(part + HEADS * D, col, N, D, STEP, MAIN, REST)
        v = _load(part + 2 * HEADS * D, col, N, D, STEP, MAIN, REST)
        do = _load(dout + window * (N * HEADS * D) + head * D, row, N, D, HEADS * D, MAIN, REST)
        row_logs = tl.load(logsumexp + rows, mask=row < N, other=0.0)
        row_dots = tl.load(dots + rows, mask=row < N, other=0.0)
        p = tl.exp2(_compare(q, k, added) * (scale * LOG2E) - row_logs[:, None])
        total += p * _compare(do, v, tl.broadcast_to(-row_dots[:, None], (ROWS, COLS)))
    dbias += (tl.program_id(2) * HEADS + head) * (N * N)
    tl.store(dbias + place, total, mask=inside)


def forward(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend; `qkv` is [windows N 3 heads D], `bias` [heads N N], `scale` positive.

    Returns:
        The result, [windows N C], and the base-2 logsumexp of each row, [windows heads N].
    """
    windows, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(windows, tokens, heads * dim)
    logsumexp = qkv.new_empty(windows, heads, tokens, dtype=torch.float32)
    if out.numel():
        sizes = _sizes("forward", qkv)
        grid = (triton.cdiv(tokens, sizes["ROWS"]), heads, windows)
        _tiles_forward[grid](qkv, bias, out, logsumexp, scale, **sizes)
    return out, logsumexp


def backward(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `qkv` and of the bias."""
    windows, tokens, _, heads, _ = qkv.shape
    dqkv, dots = qkv.new_empty(qkv.shape), logsumexp.new_empty(logsumexp.shape)
    queries, keys = _sizes("queries", qkv), _sizes("keys", qkv)
    roomy = shared_memory(qkv.device) >= HOPPER_MEMORY
    pairs = _sizes("bias" if roomy else "bias_in_little", qkv)
    tiles = triton.cdiv(tokens, pairs["ROWS"]) * triton.cdiv(tokens, pairs["COLS"])
    programs = num_multiprocessors(qkv.device) * (1 if roomy else 4)
    parts = max(1, min(windows, programs // (tiles * heads)))
    dbias = qkv.new_empty((parts, heads, tokens, tokens), dtype=torch.float32)
    if not dqkv.numel():
        return dqkv, dbias.zero_().sum(0)
    inputs = (dout, qkv, bias, logsumexp)
    grid = (triton.cdiv(tokens, queries["ROWS"]), heads, windows)
    _backward_queries[grid](*inputs, out, dots, dqkv, scale, **queries)
    grid = (triton.cdiv(tokens, keys["COLS"]), heads, windows)
    _backward_keys[grid](*inputs, dots, dqkv, scale, **keys)
    _backward_bias[tiles, heads, parts](*inputs, dots, dbias, scale, windows, **pairs)
    return dqkv, dbias.sum(0)


def _sizes(kernel: str, qkv: Tensor) -> dict[str, int]:
    _, tokens, _, heads, dim = qkv.shape
    main, rest = _widths(dim)
    return dict(HEADS=heads, N=tokens, D=dim, MAIN=main, REST=rest, **TILES[kernel])


def _widths(dim: int) -> tuple[int, int]:
    """Split a head's channels into two powers of two; the second may be 0."""
    main = max(16, 1 << dim.bit_length() - 1)
    rest = max(16, triton.next_power_of_2(dim - main)) if dim > main else 0
    return (2 * main, 0) if rest == main else (main, rest)
