"""Batch norm, activation and residual in training, in Triton; maps are [rows, channels] here.

Forward: one pass over x for the statistics, one to write the result. Backward: one pass over x and
dy for two sums a channel, one to write dx. Sums over programs are written part by part and added in
one order, so that every result is the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from zoo.layers.fused import num_multiprocessors

MAX_PARTS = 512
"""Programs whose sums are added up at once."""

TILE = 2048
"""Numbers of a map that a program of 8 warps takes at a time, 16 bytes a thread: larger tiles leave
too few warps on a multiprocessor. Tiles are read two ahead of the work: the sums of one are done
long before the next arrives."""

# One compilation serves all batches and resolutions; channels divide by 16 or are read singly.
SIZES = ["rows", "parts", "cells", "eps"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter runs on a CPU, without the GPU's library."""


@triton.jit
def _inverse(x):
    """1 / x, within 2 units in the last place; 0 beyond 2^126.

    Triton's own quotient is exact out there too, for a seventh of a whole kernel's operations.
    """
    return 1 / x if INTERPRETED else libdevice.fast_dividef(1.0, x)


@triton.jit
def _sigmoid(x):
    return _inverse(1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _normal(z):
    """The normal distribution and its density (Abramowitz and Stegun, 7.1.26: within 1e-7)."""
    t = _inverse(1 + 0.2316419 * tl.abs(z))
    upper = 1.061405429 * t - 1.453152027
    upper = ((upper * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    bell = tl.exp2(-0.7213475204444817 * z * z)
    upper = 0.5 * upper * t * bell
    return tl.where(z < 0, upper, 1 - upper), 0.3989422804014327 * bell


@triton.jit
def _tanh_gate(z):
    """(1 + tanh(u)) / 2 of GELU's approximation, and the slope of 2 u."""
    square = z * z
    power = z * (-2.302208198 - 0.1029432396 * square)  # -2 u in units of ln 2
    return _inverse(1 + tl.exp2(power)), 1.5957691216 + 0.2140644488 * square


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0)
    elif ACT == "silu":
        z = z * _sigmoid(z)
    elif ACT == "gelu":
        below, _ = _normal(z)
        z = z * below
    elif ACT == "gelu_tanh":
        gate, _ = _tanh_gate(z)
        z = z * gate
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    if ACT == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "silu":
        gate = _sigmoid(z)
        slope = gate * (1 + z * (1 - gate))
    elif ACT == "gelu":
        below, density = _normal(z)
        slope = below + z * density
    elif ACT == "gelu_tanh":
        gate, rise = _tanh_gate(z)
        slope = gate * (1 + z * (1 - gate) * rise)
    else:
        slope = z * 0 + 1
    return slope


@triton.jit
def _read(x, row, col, rows, WIDTH: tl.constexpr):
    """A tile as it lies in memory; zeros outside of the map."""
    inside = (row < rows)[:, None] & (col < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + col[None, :]
    return tl.load(x + place, mask=inside, other=0.0)


@triton.jit
def _write(y, value, row, col, rows, WIDTH: tl.constexpr):
    inside = (row < rows)[:, None] & (col < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + col[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _line(mean, var, weight, bias, col, eps, C: tl.constexpr):
    """Mean and 1 / deviation of each channel, and z = a x + b; zeros beyond the last."""
    m = tl.load(mean + col, mask=col < C, other=0.0)
    r = tl.rsqrt(tl.load(var + col, mask=col < C, other=1.0) + eps)
    a = r * tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    b = tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32) - m * a
    return m, r, a, b


@triton.jit
def _scaled(value, scale, row, rows, cells):
    """Times the factor of each row's image."""
    if scale is not None:
        factor = tl.load(scale + row // cells, mask=row < rows, other=0.0)
        value = value * factor.to(tl.float32)[:, None]
    return value


@triton.jit(do_not_specialize=SIZES)
def _statistics(
    x, means, squares, rows,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of the rows that this program sees.

    Summed around its first row, so that a mean far from zero costs no digits.
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * ROWS
    around = tl.load(x + first.to(tl.int64) * D + col, mask=col < D, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    square = tl.zeros((ROWS, COLS), tl.float32)
    seen = 0
    apart = tl.num_programs(1) * ROWS
    ahead = _read(x, first + tl.arange(0, ROWS), col, rows, D)
    later = _read(x, first + apart + tl.arange(0, ROWS), col, rows, D)
    for begin in range(first, rows, apart):
        row = begin + tl.arange(0, ROWS)
        value = ahead
        ahead = later
        later = _read(x, row + 2 * apart, col, rows, D)
        off = tl.where((row < rows)[:, None], value.to(tl.float32) - around[None, :], 0.0)
        total += off
        square += off * off
        seen += tl.minimum(ROWS, rows - begin)
    sums = tl.sum(total, 0)
    out = tl.program_id(1) * C + col
    tl.store(means + out, around + sums / seen, mask=col < C)
    tl.store(squares + out, tl.sum(square, 0) - sums * sums / seen, mask=col < C)


@triton.jit(do_not_specialize=SIZES)
def _join_statistics(
    means, squares, mean, var, rows, parts,
    C: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all rows, from those of the programs (Chan et al., 1979)."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.arange(0, PARTS)
    tiles = tl.cdiv(rows, ROWS)
    # Programs take tiles in turns; the last tile may be short.
    seen = ((tiles - 1 - part) // parts + 1) * ROWS
    seen -= tl.where((tiles - 1) % parts == part, tiles * ROWS - rows, 0)
    seen = tl.where(part < parts, seen, 0).to(tl.float32)[:, None]
    place = part[:, None] * C + col[None, :]
    inside = (part < parts)[:, None] & (col < C)[None, :]
    each = tl.load(means + place, mask=inside, other=0.0)
    within = tl.load(squares + place, mask=inside, other=0.0)
    all_rows = rows.to(tl.float32)
    m = tl.sum(each * (seen / all_rows), 0)
    off = each - m[None, :]
    v = tl.sum(within + seen * off * off, 0) / all_rows
    tl.store(mean + col, m, mask=col < C)
    tl.store(var + col, v, mask=col < C)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, mean, var, weight, bias, plus, scale, y, rows, cells, eps, ACT: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    _, _, a, b = _line(mean, var, weight, bias, col, eps, C)
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    ahead = _read(x, first + tl.arange(0, ROWS), col, rows, D)
    later = _read(x, first + apart + tl.arange(0, ROWS), col, rows, D)
    for begin in range(first, rows, apart):
        row = begin + tl.arange(0, ROWS)
        value = ahead
        ahead = later
        later = _read(x, row + 2 * apart, col, rows, D)
        z = value.to(tl.float32) * a[None, :] + b[None, :]
        out = _scaled(_act(z, ACT), scale, row, rows, cells)
        if plus is not None:
            out += _read(plus, row, col, rows, P).to(tl.float32)
        _write(y, out, row, col, rows, W)


@triton.jit
def _read_both(x, dy, row, col, rows, D: tl.constexpr, W: tl.constexpr):
    return _read(x, row, col, rows, D), _read(dy, row, col, rows, W)


@triton.jit
def _back_to_z(both, a, b, scale, row, rows, cells, ACT: tl.constexpr):
    """x in float32, and the gradient of z = a x + b."""
    value = both[0].to(tl.float32)
    dz = _scaled(both[1].to(tl.float32), scale, row, rows, cells)
    return value, dz * _slope(value * a[None, :] + b[None, :], ACT)


@triton.jit(do_not_specialize=SIZES)
def _backward_sums(
    dy, x, mean, var, weight, bias, scale, sums, rows, cells, eps, ACT: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """This program's parts of the gradients of the bias and of the weight."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    m, r, a, b = _line(mean, var, weight, bias, col, eps, C)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    ahead = _read_both(x, dy, first + tl.arange(0, ROWS), col, rows, D, W)
    later = _read_both(x, dy, first + apart + tl.arange(0, ROWS), col, rows, D, W)
    for begin in range(first, rows, apart):
        row = begin + tl.arange(0, ROWS)
        value, dz = _back_to_z(ahead, a, b, scale, row, rows, cells, ACT)
        ahead = later
        later = _read_both(x, dy, row + 2 * apart, col, rows, D, W)
        dbias += dz
        dweight += dz * (value - m[None, :])  # zero beyond the last row, as dy is
    out = tl.program_id(1) * 2 * C + col
    tl.store(sums + out, tl.sum(dbias, 0), mask=col < C)
    tl.store(sums + C + out, tl.sum(dweight, 0) * r, mask=col < C)


@triton.jit(do_not_specialize=SIZES)
def _join_sums(
    sums, dbias, dweight, parts, C: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr
):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.arange(0, PARTS)
    place = part[:, None] * (2 * C) + col[None, :]
    inside = (part < parts)[:, None] & (col < C)[None, :]
    total = tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0)
    tl.store(dbias + col, total, mask=col < C)
    total = tl.sum(tl.load(sums + C + place, mask=inside, other=0.0), 0)
    tl.store(dweight + col, total, mask=col < C)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    dy, x, mean, var, weight, bias, scale, dbias, dweight, dx, rows, cells, eps,
    ACT: tl.constexpr, C: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """dx = a (dz - mean(dz) - x̂ mean(dz x̂)), the last two being a line in x."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    m, r, a, b = _line(mean, var, weight, bias, col, eps, C)
    all_rows = rows.to(tl.float32)
    tilt = a * r * tl.load(dweight + col, mask=col < C, other=0.0) / all_rows
    level = a * tl.load(dbias + col, mask=col < C, other=0.0) / all_rows - tilt * m
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    ahead = _read_both(x, dy, first + tl.arange(0, ROWS), col, rows, D, W)
    later = _read_both(x, dy, first + apart + tl.arange(0, ROWS), col, rows, D, W)
    for begin in range(first, rows, apart):
        row = begin + tl.arange(0, ROWS)
        value, dz = _back_to_z(ahead, a, b, scale, row, rows, cells, ACT)
        ahead = later
        later = _read_both(x, dy, row + 2 * apart, col, rows, D, W)
        dz = dz * a[None, :] - (value * tilt[None, :] + level[None, :])
        _write(dx, dz, row, col, rows, D)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    plus: Tensor | None,
    scale: Tensor | None,
    act: str,
    eps: float,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the result, [B `width` H W], and mean and variance in float32; see `batch_norm_act`."""
    chs, rows = weight.numel(), x.numel() // x.shape[1]
    y = torch.empty(
        (x.shape[0], width, *x.shape[2:]), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    tile, columns, parts = _plan(x, 4)
    means, squares = x.new_empty((2, parts, chs), dtype=torch.float32)
    mean, var = (x.new_empty(chs, dtype=torch.float32) for _ in range(2))
    sizes = dict(C=chs, D=x.shape[1], **tile)
    _statistics[columns, parts](x, means, squares, rows, **sizes, num_warps=8)
    _join_statistics[(triton.cdiv(chs, 8),)](
        means, squares, mean, var, rows, parts, C=chs, ROWS=tile["ROWS"],
        PARTS=triton.next_power_of_2(parts), COLS=8,
    )  # fmt: skip
    _forward[_grid(x, tile, columns)](
        x, mean, var, weight, bias, plus, scale, y, rows, _cells(x), eps, ACT=act, W=width,
        P=0 if plus is None else plus.shape[1], **sizes, num_warps=8,
    )  # fmt: skip
    return y, mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of x, the weight and the bias."""
    chs, rows = weight.numel(), x.numel() // x.shape[1]
    dx = torch.empty_like(x)
    tile, columns, parts = _plan(x, 2)
    sums = x.new_empty((parts, 2, chs), dtype=torch.float32)
    dbias, dweight = (x.new_empty(chs, dtype=torch.float32) for _ in range(2))
    sizes = dict(ACT=act, C=chs, D=x.shape[1], W=dy.shape[1], **tile, num_warps=8)
    given = (dy, x, mean, var, weight, bias, scale)
    _backward_sums[columns, parts](*given, sums, rows, _cells(x), eps, **sizes)
    _join_sums[(triton.cdiv(chs, 8),)](
        sums, dbias, dweight, parts, C=chs, PARTS=triton.next_power_of_2(parts), COLS=8
    )
    _backward[_grid(x, tile, columns)](*given, dbias, dweight, dx, rows, _cells(x), eps, **sizes)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _plan(x: Tensor, programs: int) -> tuple[dict[str, int], int, int]:
    """The sides of a tile, the tiles that cover a row, and the programs that share the rows.

    Args:
        programs: That fit on a multiprocessor at once; one more would wait for all of them.
    """
    cols = min(256, max(16, triton.next_power_of_2(x.shape[1])))
    columns = triton.cdiv(x.shape[1], cols)
    tile = dict(ROWS=TILE // cols, COLS=cols)
    tiles = triton.cdiv(x.numel() // x.shape[1], tile["ROWS"])
    wanted = max(1, programs * num_multiprocessors(x.device) // columns)
    return tile, columns, min(tiles, wanted, MAX_PARTS)


def _grid(x: Tensor, tile: dict[str, int], columns: int) -> tuple[int, int]:
    """Programs that write a map: enough to fill the GPU some times over."""
    tiles = triton.cdiv(x.numel() // x.shape[1], tile["ROWS"])
    return columns, min(tiles, max(1, 32 * num_multiprocessors(x.device) // columns))


def _cells(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]
