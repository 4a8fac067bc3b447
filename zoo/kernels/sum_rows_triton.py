"""Sums over the parts that programs have written, always in the same order, in Triton."""

import triton
import triton.language as tl

TILE = 4096
"""Numbers that a program of four warps reads at a time."""


def tiles_for(count: int) -> dict[str, int]:
    """Choose the tile that sums `count` rows: all of them at a time, up to 128."""
    rows = min(triton.next_power_of_2(count), 128)
    return dict(ROWS=rows, COLS=min(TILE // rows, 128))


@triton.jit
def sum_rows(parts, column, count, columns, ROWS: tl.constexpr):
    """Sum `count` rows of `columns` numbers, at those columns that are in `column`."""
    total = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        limit = tl.where(row < count, columns, 0)
        place = parts + row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(place, mask=column[None, :] < limit[:, None], other=0.0)
    return tl.sum(total, 0)
