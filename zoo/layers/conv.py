"""Convolution, batch norm and activation as one unit that can be folded."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

UNIT = 16
"""Channels that the GPU's convolutions take at once: 208 and 400 run faster than 200 and 392."""


class Conv2d(nn.Conv2d):
    """torch's convolution, with channels that tensor cores can read.

    Widths that 16 does not divide, as the 196 and 392 of the large models, run on a GPU in 16 bits
    up to three times slower than those that it does (H200), so there both sides are filled up with
    zeros. In a compiled model that costs nothing: the producer of the input writes the zeros.
    """

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        more_in, more_out = -self.in_channels % UNIT, -self.out_channels % UNIT
        narrow = self.in_channels < UNIT  # an image: nothing is gained
        if self.groups > 1 or narrow or not (more_in or more_out) or not _in_16_bits(input):
            return super().forward(input)
        input = F.pad(input, (0, 0, 0, 0, 0, more_in))
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
        bias = None if self.bias is None else F.pad(self.bias, (0, more_out))
        x = F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation)
        # Not a slice: its backward would leave channels last, and each convolution would copy.
        return F.pad(x, (0, 0, 0, 0, 0, -more_out)) if more_out else x


def _in_16_bits(x: Tensor) -> bool:
    """Whether a product with `x` runs on a GPU in 16 bits."""
    return x.is_cuda and (x.element_size() == 2 or torch.is_autocast_enabled("cuda"))


class ConvNorm(nn.Module):
    """Convolution - batch norm - activation, [B C H W] -> [B D H/stride W/stride]."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        act: Callable[[], nn.Module] = nn.Identity,
    ):
        super().__init__()
        self.conv = Conv2d(
            in_chs, out_chs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_chs, eps=eps)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> None:
        """Fold the batch norm's running statistics into the convolution, in place."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class Stem(nn.Sequential):
    """Two convolutions of stride 2, [B C H W] -> [B D H/4 W/4]."""

    def __init__(self, in_chans: int, hidden: int, dim: int, *, eps: float):
        super().__init__(
            ConvNorm(in_chans, hidden, stride=2, eps=eps, act=nn.ReLU),
            ConvNorm(hidden, dim, stride=2, eps=eps, act=nn.ReLU),
        )
