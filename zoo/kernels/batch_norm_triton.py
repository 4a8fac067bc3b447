"""Batch norm, activation and residual in training, in Triton; maps are [pixels, channels] here.

Forward: one pass over x for the statistics, one to write the result. Backward: one pass over x and
dy for two sums a channel, one to write dx. Sums over programs are written part by part and added in
one order, so that every result is the same bits each time.

Tiles are powers of two, channels are not: `SPAN` pixels side by side make a row that tiles divide,
208 channels for example 16 pixels and 13 tiles, and no thread works on nothing. A column of such
rows is always the same channel.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.available import num_multiprocessors
from zoo.kernels.sigmoid_triton import inverse, sigmoid

MAX_PARTS = 8192
"""Sums of a channel that are added up at once: one for each program and pixel of a row."""

TILE = 2048
"""Numbers of a map that a program takes at a time, 32 bytes a thread. Two tiles are read ahead of
the one in work: its sums are done long before the next arrives."""

COLS = 512
"""Numbers of a row in a tile."""

WARPS = 4

SUMMING = 5, 3
"""Programs on a multiprocessor that sum, forward and backward: on an H200 fewer read too little at
a time, and more slow each other down."""

WRITING = 32
"""Programs on a multiprocessor that write."""

# One compilation serves all batches and resolutions; channels divide by 16 or are read singly.
SIZES = ["pixels", "parts", "cells", "eps"]


@triton.jit
def _upper_tail(z):
    """The normal distribution of -|z|, and its density (Abramowitz and Stegun, 7.1.26: 1e-7)."""
    t = inverse(1 + 0.2316419 * tl.abs(z))
    upper = 0.5307027145 * t - 0.7265760135
    upper = ((upper * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
    bell = tl.exp2(-0.7213475204444817 * z * z)
    return upper * t * bell, 0.3989422804014327 * bell


@triton.jit
def _tanh_gate(z):
    """(1 + tanh(u)) / 2 of GELU's approximation, and the slope of 2 u."""
    square = z * z
    power = z * (-2.302208198 - 0.1029432396 * square)  # -2 u in units of ln 2
    return inverse(1 + tl.exp2(power)), 1.5957691216 + 0.2140644488 * square


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.maximum(z, 0.0)
    elif ACT == "silu":
        z = z * sigmoid(z)
    elif ACT == "gelu":
        upper, _ = _upper_tail(z)
        z = tl.maximum(z, 0.0) - tl.abs(z) * upper
    elif ACT == "gelu_tanh":
        gate, _ = _tanh_gate(z)
        z = z * gate
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    if ACT == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "silu":
        gate = sigmoid(z)
        slope = gate * (1 + z * (1 - gate))
    elif ACT == "gelu":
        upper, density = _upper_tail(z)
        slope = tl.where(z < 0, upper, 1 - upper) + z * density
    elif ACT == "gelu_tanh":
        gate, rise = _tanh_gate(z)
        slope = gate * (1 + z * (1 - gate) * rise)
    else:
        slope = z * 0 + 1
    return slope


@triton.jit
def _columns(D: tl.constexpr, COLS: tl.constexpr):
    """This program's columns of a row: their places, and the pixel and channel of each."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    return col, col // D, col % D


@triton.jit
def _inside(row, columns, pixels, SPAN: tl.constexpr, WHOLE: tl.constexpr):
    """Which numbers of a tile exist: `WHOLE` rows do or do not, else some pixels of the last do."""
    if WHOLE:
        inside = (row * SPAN < pixels)[:, None]
    else:
        inside = (row * SPAN)[:, None] + columns[1][None, :] < pixels
    return inside


@triton.jit
def _place(
    row, columns, pixels,
    WIDTH: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Where a tile of `D` channels lies in a map of `WIDTH`, and which of its numbers are there."""
    inside = _inside(row, columns, pixels, SPAN, WHOLE)
    place = row.to(tl.int64)[:, None] * (SPAN * WIDTH)
    if WIDTH == D:
        place += columns[0][None, :]
    else:
        place += (columns[1] * WIDTH + columns[2])[None, :]
        inside = inside & (columns[2] < WIDTH)[None, :]
    return place, inside


@triton.jit
def _read(
    x, row, columns, pixels,
    WIDTH: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile as it lies in memory; zeros outside of the map."""
    place, inside = _place(row, columns, pixels, WIDTH, D, SPAN, WHOLE)
    return tl.load(x + place, mask=inside, other=0.0)


@triton.jit
def _write(
    y, value, row, columns, pixels,
    WIDTH: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    place, inside = _place(row, columns, pixels, WIDTH, D, SPAN, WHOLE)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _line(mean, var, weight, bias, channel, eps, C: tl.constexpr):
    """Mean and 1 / deviation of each channel, and z = a x + b; zeros beyond the last."""
    known = channel < C
    m = tl.load(mean + channel, mask=known, other=0.0)
    r = tl.rsqrt(tl.load(var + channel, mask=known, other=1.0) + eps)
    a = r * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32) - m * a
    return m, r, a, b


@triton.jit
def _scaled(
    value, scale, row, columns, pixels, cells,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Times the factor of each pixel's image, which has `cells` of them; rows, if `APART`."""
    if scale is not None:
        inside = _inside(row, columns, pixels, SPAN, WHOLE)
        if APART:
            image = (row // (cells // SPAN))[:, None]
        else:
            image = ((row * SPAN)[:, None] + columns[1][None, :]) // cells
        value = value * tl.load(scale + image, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _num_read(part, pixel, pixels, parts, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """How many of a column's numbers a program reads: tiles go round, the last may be short."""
    rows = (pixels - pixel + SPAN - 1) // SPAN
    tiles = (rows + ROWS - 1) // ROWS
    num_read = ((tiles - 1 - part) // parts + 1) * ROWS
    num_read -= tl.where((tiles - 1) % parts == part, tiles * ROWS - rows, 0)
    return tl.where(part < tiles, num_read, 0)


@triton.jit(do_not_specialize=SIZES)
def _statistics(
    x, means, squares, pixels,
    C: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of what this program sees of each column.

    Summed around its first row, so that a mean far from zero costs no digits.
    """
    columns = _columns(D, COLS)
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    known = first * SPAN + columns[1] < pixels
    place = first.to(tl.int64) * (SPAN * D) + columns[0]
    around = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    square = tl.zeros((ROWS, COLS), tl.float32)
    row = first + tl.arange(0, ROWS)
    ahead = _read(x, row, columns, pixels, D, D, SPAN, WHOLE)
    later = _read(x, row + apart, columns, pixels, D, D, SPAN, WHOLE)
    for begin in range(first, tl.cdiv(pixels, SPAN), apart):
        row = begin + tl.arange(0, ROWS)
        value = ahead
        ahead = later
        later = _read(x, row + 2 * apart, columns, pixels, D, D, SPAN, WHOLE)
        off = value.to(tl.float32) - around[None, :]
        off = tl.where(_inside(row, columns, pixels, SPAN, WHOLE), off, 0.0)
        total += off
        square += off * off
    sums = tl.sum(total, 0)
    part = tl.program_id(1)
    shift = sums / tl.maximum(
        _num_read(part, columns[1], pixels, tl.num_programs(1), SPAN, ROWS), 1
    )
    out = (part * SPAN + columns[1]) * C + columns[2]
    tl.store(means + out, around + shift, mask=columns[2] < C)
    tl.store(squares + out, tl.sum(square, 0) - sums * shift, mask=columns[2] < C)


@triton.jit(do_not_specialize=SIZES)
def _join_statistics(
    means, squares, mean, var, pixels, parts,
    C: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all pixels, from those of programs and columns (Chan et al., 1979)."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.arange(0, PARTS)
    known = row < parts * SPAN
    num_read = _num_read(row // SPAN, row % SPAN, pixels, parts, SPAN, ROWS)
    num_read = tl.where(known, num_read, 0).to(tl.float32)[:, None]
    place = row[:, None] * C + col[None, :]
    inside = known[:, None] & (col < C)[None, :]
    each = tl.load(means + place, mask=inside, other=0.0)
    within = tl.load(squares + place, mask=inside, other=0.0)
    count = pixels.to(tl.float32)
    m = tl.sum(each * (num_read / count), 0)
    off = each - m[None, :]
    v = tl.sum(within + num_read * off * off, 0) / count
    tl.store(mean + col, m, mask=col < C)
    tl.store(var + col, v, mask=col < C)


@triton.jit(do_not_specialize=SIZES)
def _norm_forward(
    x, mean, var, weight, bias, plus, scale, y, pixels, cells, eps, ACT: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    columns = _columns(D, COLS)
    _, _, a, b = _line(mean, var, weight, bias, columns[2], eps, C)
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    row = first + tl.arange(0, ROWS)
    ahead = _read(x, row, columns, pixels, D, D, SPAN, WHOLE)
    later = _read(x, row + apart, columns, pixels, D, D, SPAN, WHOLE)
    for begin in range(first, tl.cdiv(pixels, SPAN), apart):
        row = begin + tl.arange(0, ROWS)
        value = ahead
        ahead = later
        later = _read(x, row + 2 * apart, columns, pixels, D, D, SPAN, WHOLE)
        z = value.to(tl.float32) * a[None, :] + b[None, :]
        out = _scaled(_act(z, ACT), scale, row, columns, pixels, cells, SPAN, WHOLE, APART)
        if plus is not None:
            out += _read(plus, row, columns, pixels, P, D, SPAN, WHOLE).to(tl.float32)
        _write(y, out, row, columns, pixels, W, D, SPAN, WHOLE)


@triton.jit
def _read_both(
    x, dy, row, columns, pixels,
    D: tl.constexpr, W: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    return (
        _read(x, row, columns, pixels, D, D, SPAN, WHOLE),
        _read(dy, row, columns, pixels, W, D, SPAN, WHOLE),
    )


@triton.jit
def _back_to_z(
    both, a, b, scale, row, columns, pixels, cells,
    ACT: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """x in float32, and the gradient of z = a x + b."""
    value = both[0].to(tl.float32)
    dz = _scaled(both[1].to(tl.float32), scale, row, columns, pixels, cells, SPAN, WHOLE, APART)
    return value, dz * _slope(value * a[None, :] + b[None, :], ACT)


@triton.jit(do_not_specialize=SIZES)
def _backward_sums(
    dy, x, mean, var, weight, bias, scale, sums, pixels, cells, eps, ACT: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """This program's parts of the gradients of the bias and of the weight."""
    columns = _columns(D, COLS)
    m, r, a, b = _line(mean, var, weight, bias, columns[2], eps, C)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    row = first + tl.arange(0, ROWS)
    ahead = _read_both(x, dy, row, columns, pixels, D, W, SPAN, WHOLE)
    later = _read_both(x, dy, row + apart, columns, pixels, D, W, SPAN, WHOLE)
    for begin in range(first, tl.cdiv(pixels, SPAN), apart):
        row = begin + tl.arange(0, ROWS)
        value, dz = _back_to_z(
            ahead, a, b, scale, row, columns, pixels, cells, ACT, SPAN, WHOLE, APART
        )
        ahead = later
        later = _read_both(x, dy, row + 2 * apart, columns, pixels, D, W, SPAN, WHOLE)
        dbias += dz
        dweight += dz * (value - m[None, :])  # zero outside of the map, as dy is
    out = (tl.program_id(1) * SPAN + columns[1]) * (2 * C) + columns[2]
    tl.store(sums + out, tl.sum(dbias, 0), mask=columns[2] < C)
    tl.store(sums + C + out, tl.sum(dweight, 0) * r, mask=columns[2] < C)


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
def _norm_backward(
    dy, x, mean, var, weight, bias, scale, dbias, dweight, dx, pixels, cells, eps,
    ACT: tl.constexpr, C: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = a (dz - mean(dz) - x̂ mean(dz x̂)), the last two being a line in x."""
    columns = _columns(D, COLS)
    m, r, a, b = _line(mean, var, weight, bias, columns[2], eps, C)
    count, known = pixels.to(tl.float32), columns[2] < C
    tilt = a * r * tl.load(dweight + columns[2], mask=known, other=0.0) / count
    level = a * tl.load(dbias + columns[2], mask=known, other=0.0) / count - tilt * m
    first, apart = tl.program_id(1) * ROWS, tl.num_programs(1) * ROWS
    row = first + tl.arange(0, ROWS)
    ahead = _read_both(x, dy, row, columns, pixels, D, W, SPAN, WHOLE)
    later = _read_both(x, dy, row + apart, columns, pixels, D, W, SPAN, WHOLE)
    for begin in range(first, tl.cdiv(pixels, SPAN), apart):
        row = begin + tl.arange(0, ROWS)
        value, dz = _back_to_z(
            ahead, a, b, scale, row, columns, pixels, cells, ACT, SPAN, WHOLE, APART
        )
        ahead = later
        later = _read_both(x, dy, row + 2 * apart, columns, pixels, D, W, SPAN, WHOLE)
        dz = dz * a[None, :] - (value * tilt[None, :] + level[None, :])
        _write(dx, dz, row, columns, pixels, D, D, SPAN, WHOLE)


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
    """Return the result, [B `width` H W], mean and variance in float32; see `batch_norm_act`."""
    chs, pixels = weight.numel(), x.numel() // x.shape[1]
    shape, last = (x.shape[0], width, *x.shape[2:]), torch.channels_last
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
    tile, columns, parts = _plan(x, SUMMING[0])
    span = tile["SPAN"]
    means, squares = x.new_empty((2, parts * span, chs), dtype=torch.float32)
    mean, var = (x.new_empty(chs, dtype=torch.float32) for _ in range(2))
    sizes = dict(C=chs, D=x.shape[1], **tile, num_warps=WARPS)
    apart = _cells(x) % span == 0
    _statistics[columns, parts](x, means, squares, pixels, **sizes)
    _join_statistics[(triton.cdiv(chs, 4),)](
        means, squares, mean, var, pixels, parts, C=chs, SPAN=span, ROWS=tile["ROWS"],
        **_all_of(parts, span),
    )  # fmt: skip
    _norm_forward[_grid(x, tile, columns)](
        x, mean, var, weight, bias, plus, scale, y, pixels, _cells(x), eps, ACT=act, W=width,
        P=0 if plus is None else plus.shape[1], APART=apart, **sizes,
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
    """Return the gradients of x, the weight and the bias."""
    chs, pixels = weight.numel(), x.numel() // x.shape[1]
    dx = torch.empty_like(x)
    tile, columns, parts = _plan(x, SUMMING[1])
    span = tile["SPAN"]
    sums = x.new_empty((parts * span, 2, chs), dtype=torch.float32)
    dbias, dweight = (x.new_empty(chs, dtype=torch.float32) for _ in range(2))
    apart = _cells(x) % span == 0
    sizes = dict(C=chs, D=x.shape[1], W=dy.shape[1], **tile, num_warps=WARPS)
    sizes |= dict(ACT=act, APART=apart)
    inputs, measures = (dy, x, mean, var, weight, bias, scale), (pixels, _cells(x), eps)
    _backward_sums[columns, parts](*inputs, sums, *measures, **sizes)
    _join_sums[(triton.cdiv(chs, 4),)](
        sums, dbias, dweight, parts * span, C=chs, **_all_of(parts, span)
    )
    _norm_backward[_grid(x, tile, columns)](*inputs, dbias, dweight, dx, *measures, **sizes)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _plan(x: Tensor, programs: int) -> tuple[dict[str, int | bool], int, int]:
    """Return a tile's sizes, the tiles that cover a row, and the programs that share the rows.

    Args:
        programs: Wanted on each multiprocessor.
    """
    cols, pixels = min(COLS, TILE), x.numel() // x.shape[1]
    span = cols // math.gcd(cols, x.shape[1])
    columns = span * x.shape[1] // cols
    tile = dict(ROWS=TILE // cols, COLS=cols, SPAN=span, WHOLE=pixels % span == 0)
    wanted = max(1, programs * num_multiprocessors(x.device) // columns)
    return tile, columns, min(_tiles(x, tile), wanted, max(1, MAX_PARTS // span))


def _grid(x: Tensor, tile: dict[str, int | bool], columns: int) -> tuple[int, int]:
    """Return the grid of programs that write a map: enough to fill the GPU a few times over."""
    return columns, min(_tiles(x, tile), max(1, WRITING * num_multiprocessors(x.device) // columns))


def _tiles(x: Tensor, tile: dict[str, int | bool]) -> int:
    """Count the tiles of a column."""
    return triton.cdiv(x.numel() // x.shape[1], tile["SPAN"] * tile["ROWS"])


def _all_of(parts: int, span: int) -> dict[str, int]:
    """Return sizes for one program that adds up all partial sums of four channels."""
    return dict(PARTS=triton.next_power_of_2(parts * span), COLS=4, num_warps=8)


def _cells(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]
