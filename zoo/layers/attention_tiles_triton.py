"""Attention with a bias inside windows of more than 64 tokens, in Triton.

Logits pass in tiles, as in FlashAttention-2 (2307.08691): the forward kernel keeps the logarithm
of each row's sum, from which the backward kernels find the probabilities again. Unlike torch's
kernels these never write a gradient of [windows heads N N]: a program sums that of its rows of the
bias over its windows, and programs are summed in one order, so it is the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.layers.fused import num_multiprocessors
from zoo.layers.sigmoid_triton import LOG2E

TILE = 64
"""Tokens of a tile, queries or keys."""


@triton.jit
def _place(token, D: tl.constexpr, STEP: tl.constexpr, DP: tl.constexpr):
    return token[:, None] * STEP + tl.arange(0, DP)[None, :]


@triton.jit
def _load(part, token, N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, DP: tl.constexpr):
    """Some tokens of one head, [tokens DP], zeros where there are none; they lie `STEP` apart."""
    inside = (token < N)[:, None] & (tl.arange(0, DP) < D)[None, :]
    return tl.load(part + _place(token, D, STEP, DP), mask=inside, other=0.0)


@triton.jit
def _store(part, token, x, N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, DP: tl.constexpr):
    inside = (token < N)[:, None] & (tl.arange(0, DP) < D)[None, :]
    tl.store(part + _place(token, D, STEP, DP), x.to(part.dtype.element_ty), mask=inside)


@triton.jit
def _logits(q, k, bias, row, col, scale, N: tl.constexpr):
    """Logits in units of 1 / log2(e), -inf for keys that are not there. `bias` is the head's."""
    inside = (row < N)[:, None] & (col < N)[None, :]
    added = tl.load(bias + row[:, None] * N + col[None, :], mask=inside, other=0.0)
    logits = tl.dot(q, tl.trans(k)) * (scale * LOG2E) + added.to(tl.float32) * LOG2E
    return tl.where((col < N)[None, :], logits, -float("inf"))


@triton.jit
def _tiles_forward(
    qkv, bias, out, sums, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The result and, in `sums`, the binary logarithm of each row's sum of exponentials."""
    head, window = tl.program_id(1), tl.program_id(2).to(tl.int64)
    STEP: tl.constexpr = 3 * HEADS * D
    part = qkv + window * (N * STEP) + head * D
    bias += head * (N * N)
    row = tl.program_id(0) * T + tl.arange(0, T)
    q = _load(part, row, N, D, STEP, DP)
    highest = tl.full((T,), -float("inf"), tl.float32)
    total = tl.zeros((T,), tl.float32)
    mixed = tl.zeros((T, DP), tl.float32)
    for first in range(0, N, T):
        col = first + tl.arange(0, T)
        k = _load(part + HEADS * D, col, N, D, STEP, DP)
        v = _load(part + 2 * HEADS * D, col, N, D, STEP, DP)
        logits = _logits(q, k, bias, row, col, scale, N)
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(p, 1)
        mixed = mixed * shrunk[:, None] + tl.dot(p.to(v.dtype), v)
        highest = higher
    _store(
        out + window * (N * HEADS * D) + head * D, row, mixed / total[:, None], N, D, HEADS * D, DP
    )
    tl.store(sums + (window * HEADS + head) * N + row, highest + tl.log2(total), mask=row < N)


@triton.jit
def _backward_keys(
    dout, qkv, bias, sums, dots, dqkv, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values; tiles of logits are [keys, queries] here."""
    head, window = tl.program_id(1), tl.program_id(2).to(tl.int64)
    STEP: tl.constexpr = 3 * HEADS * D
    FEW: tl.constexpr = T // 2
    part, dpart = qkv + window * (N * STEP) + head * D, dqkv + window * (N * STEP) + head * D
    dout += window * (N * HEADS * D) + head * D
    bias += head * (N * N)
    sums += (window * HEADS + head) * N
    dots += (window * HEADS + head) * N
    col = tl.program_id(0) * T + tl.arange(0, T)
    k = _load(part + HEADS * D, col, N, D, STEP, DP)
    v = _load(part + 2 * HEADS * D, col, N, D, STEP, DP)
    dk = tl.zeros((T, DP), tl.float32)
    dv = tl.zeros((T, DP), tl.float32)
    for first in range(0, N, FEW):
        row = first + tl.arange(0, FEW)
        q = _load(part, row, N, D, STEP, DP)
        do = _load(dout, row, N, D, HEADS * D, DP)
        row_sums = tl.load(sums + row, mask=row < N, other=float("inf"))  # no probability
        row_dots = tl.load(dots + row, mask=row < N, other=0.0)
        inside = (col < N)[:, None] & (row < N)[None, :]
        added = tl.load(bias + row[None, :] * N + col[:, None], mask=inside, other=0.0)
        logits = tl.dot(k, tl.trans(q)) * (scale * LOG2E) + added.to(tl.float32) * LOG2E
        products = tl.dot(v, tl.trans(do))
        p = tl.exp2(logits - row_sums[None, :])
        ds = p * (products - row_dots[None, :])
        dv += tl.dot(p.to(do.dtype), do)
        dk += tl.dot((ds * scale).to(q.dtype), q)
    _store(dpart + HEADS * D, col, dk, N, D, STEP, DP)
    _store(dpart + 2 * HEADS * D, col, dv, N, D, STEP, DP)


@triton.jit
def _backward_queries(
    dout, qkv, bias, sums, out, dots, dqkv, scale,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of queries; and dout · out of each of them, in `dots`."""
    head, window = tl.program_id(1), tl.program_id(2).to(tl.int64)
    STEP: tl.constexpr = 3 * HEADS * D
    part = qkv + window * (N * STEP) + head * D
    mine = window * (N * HEADS * D) + head * D
    bias += head * (N * N)
    row = tl.program_id(0) * T + tl.arange(0, T)
    q = _load(part, row, N, D, STEP, DP)
    do = _load(dout + mine, row, N, D, HEADS * D, DP)
    o = _load(out + mine, row, N, D, HEADS * D, DP)
    row_dots = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(dots + (window * HEADS + head) * N + row, row_dots, mask=row < N)
    row_sums = tl.load(sums + (window * HEADS + head) * N + row, mask=row < N, other=0.0)
    dq = tl.zeros((T, DP), tl.float32)
    for first in range(0, N, T):
        col = first + tl.arange(0, T)
        k = _load(part + HEADS * D, col, N, D, STEP, DP)
        v = _load(part + 2 * HEADS * D, col, N, D, STEP, DP)
        logits = _logits(q, k, bias, row, col, scale, N)
        products = tl.dot(do, tl.trans(v))
        ds = tl.exp2(logits - row_sums[:, None]) * (products - row_dots[:, None])
        dq += tl.dot((ds * scale).to(k.dtype), k)
    _store(dqkv + window * (N * STEP) + head * D, row, dq, N, D, STEP, DP)


@triton.jit
def _backward_bias(
    dout, qkv, bias, sums, dots, dbias, scale, windows,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the bias, summed over this program's windows."""
    TILES: tl.constexpr = (N + T - 1) // T
    STEP: tl.constexpr = 3 * HEADS * D
    head = tl.program_id(1)
    row = tl.program_id(0) // TILES * T + tl.arange(0, T)
    col = tl.program_id(0) % TILES * T + tl.arange(0, T)
    bias += head * (N * N)
    total = tl.zeros((T, T), tl.float32)
    for window in range(tl.program_id(2).to(tl.int64), windows, tl.num_programs(2)):
        part = qkv + window * (N * STEP) + head * D
        rows = (window * HEADS + head) * N + row
        q = _load(part, row, N, D, STEP, DP)
        k = _load(part + HEADS * D, col, N, D, STEP, DP)
        v = _load(part + 2 * HEADS * D, col, N, D, STEP, DP)
        do = _load(dout + window * (N * HEADS * D) + head * D, row, N, D, HEADS * D, DP)
        row_sums = tl.load(sums + rows, mask=row < N, other=0.0)
        row_dots = tl.load(dots + rows, mask=row < N, other=0.0)
        logits = _logits(q, k, bias, row, col, scale, N)
        products = tl.dot(do, tl.trans(v))
        total += tl.exp2(logits - row_sums[:, None]) * (products - row_dots[:, None])
    dbias += (tl.program_id(2) * HEADS + head) * (N * N)
    inside = (row < N)[:, None] & (col < N)[None, :]
    tl.store(dbias + row[:, None] * N + col[None, :], total, mask=inside)


def forward(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend; `qkv` is [windows N 3 heads D], `bias` [heads N N].

    Returns:
        The result, [windows N C], and the logarithms that the backward needs, [windows heads N].
    """
    windows, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(windows, tokens, heads * dim)
    sums = qkv.new_empty(windows, heads, tokens, dtype=torch.float32)
    if out.numel():
        grid = (triton.cdiv(tokens, TILE), heads, windows)
        _tiles_forward[grid](qkv, bias, out, sums, scale, **_sizes(qkv), num_warps=4, num_stages=2)
    return out, sums


def backward(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Give the gradients of `qkv` and of the bias."""
    windows, tokens, _, heads, _ = qkv.shape
    dqkv, dots = qkv.new_empty(qkv.shape), sums.new_empty(sums.shape)
    tiles, sizes = triton.cdiv(tokens, TILE), dict(**_sizes(qkv), num_warps=4, num_stages=2)
    parts = max(1, min(windows, 4 * num_multiprocessors(qkv.device) // (tiles**2 * heads)))
    dbias = qkv.new_empty((parts, heads, tokens, tokens), dtype=torch.float32)
    if not dqkv.numel():
        return dqkv, dbias.zero_().sum(0)
    given = (dout, qkv, bias, sums)
    _backward_queries[tiles, heads, windows](*given, out, dots, dqkv, scale, **sizes)
    _backward_keys[tiles, heads, windows](*given, dots, dqkv, scale, **sizes)
    _backward_bias[tiles**2, heads, parts](*given, dots, dbias, scale, windows, **sizes)
    return dqkv, dbias.sum(0)


def _sizes(qkv: Tensor) -> dict[str, int]:
    _, tokens, _, heads, dim = qkv.shape
    return dict(HEADS=heads, N=tokens, D=dim, DP=max(16, triton.next_power_of_2(dim)), T=TILE)
