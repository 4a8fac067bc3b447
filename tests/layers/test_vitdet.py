"""Windowed attention in most blocks of a plain transformer."""

import pytest
import torch

from zoo.layers.vitdet import VitDet, to_raster_order, to_window_order
from zoo.layers.window import to_windows


def _kinds(plan, depth):
    return "".join("g" if plan.is_global(i, depth) else "w" for i in range(depth))


def test_the_last_block_of_each_period_is_global():
    assert _kinds(VitDet(window=7, num_global=4), 12) == "wwg" * 4
    assert _kinds(VitDet(window=7, num_windowed=3), 8) == "wwwg" * 2


def test_the_last_block_of_all_is_global_whatever_the_period():
    assert _kinds(VitDet(window=7, num_global=4), 27) == "wwwwwg" * 4 + "wwg"
    assert _kinds(VitDet(window=7, num_windowed=4), 7) == "wwwwgwg"


def test_as_many_global_blocks_as_blocks_leave_no_windows():
    assert _kinds(VitDet(window=7, num_global=6), 6) == "g" * 6
    assert _kinds(VitDet(window=7, num_windowed=0), 6) == "g" * 6


@pytest.mark.parametrize(
    "sizes", [{}, dict(num_windowed=2, num_global=2), dict(num_global=0), dict(num_windowed=-1)]
)
def test_a_plan_that_says_too_little_or_too_much_is_refused(sizes):
    with pytest.raises(ValueError, match="num_"):
        VitDet(window=7, **sizes)


def test_window_order_is_that_of_cut_windows_and_can_be_undone():
    x = torch.randn(2, 4 * 6, 3)
    ordered = to_window_order(x, 4, 6, 2)
    cut = to_windows(x.transpose(1, 2).reshape(2, 3, 4, 6), 2)
    assert torch.equal(ordered.reshape(-1, 4, 3), cut)
    assert torch.equal(to_raster_order(ordered, 4, 6, 2), x)
