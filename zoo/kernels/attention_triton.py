"""Attention inside small windows, in Triton: one program takes all tokens of a window's head.

Logits, probabilities and their gradients stay on the chip; queries, keys and values are read where
the projection wrote them, side by side. The backward kernel recomputes the probabilities, and sums
a bias's gradient over the windows of a program; the programs' sums are added in one order, so that
the result is the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.available import num_multiprocessors
from zoo.kernels.sigmoid_triton import LOG2E


@triton.jit
def _load(
    part, window,
    N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Tokens of one head, [NP DP], zeros where there are none; tokens lie `STEP` apart."""
    n = tl.arange(0, NP)[:, None]
    d = tl.arange(0, DP)[None, :]
    return tl.load(part + window * (N * STEP) + n * STEP + d, mask=(n < N) & (d < D), other=0.0)


@triton.jit
def _store(
    part, window, x,
    N: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, NP)[:, None]
    d = tl.arange(0, DP)[None, :]
    place = part + window * (N * STEP) + n * STEP + d
    tl.store(place, x.to(part.dtype.element_ty), mask=(n < N) & (d < D))


@triton.jit
def _load_bias(bias, head, N: tl.constexpr, NP: tl.constexpr):
    """A head's bias in units of 1 / log2(e); -inf for keys that are not there."""
    row = tl.arange(0, NP)[:, None]
    col = tl.arange(0, NP)[None, :]
    added = tl.where(col < N, tl.zeros((NP, NP), tl.float32), -float("inf"))
    if bias is not None:
        place = bias + head * (N * N) + row * N + col
        loaded = tl.load(place, mask=(row < N) & (col < N), other=0.0)
        added += loaded.to(tl.float32) * LOG2E
    return added


@triton.jit
def _probabilities(q, k, added, scale):
    logits = tl.dot(q, tl.trans(k)) * (scale * LOG2E) + added
    p = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _window_forward(
    qkv, bias, out, scale, windows,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    STEP: tl.constexpr = 3 * HEADS * D
    added = _load_bias(bias, head, N, NP)
    part = qkv + head * D
    for window in range(tl.program_id(1).to(tl.int64), windows, tl.num_programs(1)):
        q = _load(part, window, N, D, STEP, NP, DP)
        k = _load(part + HEADS * D, window, N, D, STEP, NP, DP)
        v = _load(part + 2 * HEADS * D, window, N, D, STEP, NP, DP)
        p = _probabilities(q, k, added, scale)
        _store(out + head * D, window, tl.dot(p.to(v.dtype), v), N, D, HEADS * D, NP, DP)


@triton.jit
def _window_backward(
    dout, qkv, bias, dqkv, dbias, scale, windows,
    HEADS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, NP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    STEP: tl.constexpr = 3 * HEADS * D
    added = _load_bias(bias, head, N, NP)
    total = tl.zeros((NP, NP), tl.float32)
    part, dpart = qkv + head * D, dqkv + head * D
    for window in range(tl.program_id(1).to(tl.int64), windows, tl.num_programs(1)):
        q = _load(part, window, N, D, STEP, NP, DP)
        k = _load(part + HEADS * D, window, N, D, STEP, NP, DP)
        v = _load(part + 2 * HEADS * D, window, N, D, STEP, NP, DP)
        do = _load(dout + head * D, window, N, D, HEADS * D, NP, DP)
        p = _probabilities(q, k, added, scale)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do)
        _store(dpart + 2 * HEADS * D, window, dv, N, D, STEP, NP, DP)
        dp = tl.dot(do, tl.trans(v))
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        total += ds
        ds = (ds * scale).to(q.dtype)
        _store(dpart, window, tl.dot(ds, k), N, D, STEP, NP, DP)
        _store(dpart + HEADS * D, window, tl.dot(tl.trans(ds), q), N, D, STEP, NP, DP)
    if dbias is not None:
        row = tl.arange(0, NP)[:, None]
        col = tl.arange(0, NP)[None, :]
        place = dbias + (tl.program_id(1) * HEADS + head) * (N * N) + row * N + col
        tl.store(place, total, mask=(row < N) & (col < N))


def _plan(qkv: Tensor, programs: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, about `programs` a multiprocessor, and the kernels' compile-time sizes."""
    windows, tokens, _, heads, dim = qkv.shape
    columns = max(1, programs * num_multiprocessors(qkv.device) // heads)
    sizes = dict(HEADS=heads, N=tokens, D=dim)
    sizes |= dict(NP=_padded(tokens), DP=_padded(dim), num_warps=4)
    return (heads, min(windows, columns)), sizes


def _padded(size: int) -> int:
    """Round a side up to one that tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def forward(qkv: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attend; `qkv` is [windows N 3 heads D], `bias` [heads N N], the result [windows N C]."""
    windows, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(windows, tokens, heads * dim)
    grid, sizes = _plan(qkv, 16)
    if out.numel():
        _window_forward[grid](qkv, bias, out, scale, windows, **sizes)
    return out


def backward(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `qkv` and of the bias, the latter in float32."""
    windows, tokens, _, heads, _ = qkv.shape
    dqkv = torch.empty_like(qkv)
    grid, sizes = _plan(qkv, 8)
    dbias = None
    if bias is not None:
        shape = (grid[1], heads, tokens, tokens)
        dbias = qkv.new_empty(shape, dtype=torch.float32)
    if dqkv.numel():
        _window_backward[grid](dout, qkv, bias, dqkv, dbias, scale, windows, **sizes)
    return dqkv, None if dbias is None else dbias.sum(0)
