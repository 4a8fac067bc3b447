"""Convolutions whose channels are padded on a GPU."""

import pytest
import torch
from torch import nn

from zoo.layers.conv import Conv2d, ConvNorm


def test_on_a_cpu_it_is_torchs_convolution():
    torch.manual_seed(0)
    ours = Conv2d(20, 12, 3, padding=1)
    theirs = nn.Conv2d(20, 12, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 5, 7)
    assert torch.equal(ours(x), theirs(x))


def test_a_folded_unit_still_fills_up():
    unit = ConvNorm(20, 12).eval()
    unit.fuse()
    assert isinstance(unit.conv, Conv2d)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(20, 12), (32, 20), (20, 32), (3, 20)])
def test_output_and_gradients_are_those_of_float32(widths):
    torch.manual_seed(0)
    conv = Conv2d(*widths, 3, stride=2, padding=1).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, widths[0], 9, 7, device="cuda", requires_grad=True)
    exact = conv(x)
    dy = torch.randn_like(exact)
    inputs = [x, conv.weight, conv.bias]
    wanted = [exact, *torch.autograd.grad(exact, inputs, dy)]
    with torch.autocast("cuda", torch.bfloat16):
        y = conv(x)
    found = [y, *torch.autograd.grad(y, inputs, dy.bfloat16())]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()
