"""Resizing to the nearest cells is torch's interpolation, value for value."""

import pytest
import torch
import torch.nn.functional as F

from zoo.layers.nearest import resize_nearest


@pytest.mark.parametrize(
    "sides", [(8, 6), (16, 18), (16, 6), (4, 2), (1, 1), (2, 6), (5, 9), (24, 3), (16, 9)]
)
def test_it_is_interpolate_and_so_is_its_gradient(sides):
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = resize_nearest(x, *sides), F.interpolate(x, sides)
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs))
    )
