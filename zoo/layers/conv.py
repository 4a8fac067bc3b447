"""Convolution, batch norm and activation as one unit that folds into one convolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.kernels import batch_norm as batch_norm_op
from zoo.kernels.available import runs_kernels

UNIT = 16
"""Channels are padded to a multiple of this on a GPU: 208 and 400 run faster than 200 and 392."""

UNIT_OF_IMAGES = 8
"""The same for as few channels as an image has."""


class Conv2d(nn.Conv2d):
    """torch's convolution, with channels padded to what tensor cores read.

    Widths that 16 does not divide, as the 196 and 392 of the large models, run on a GPU in 16 bits
    up to three times slower than those that it does (H200), so there input and output channels are
    padded with zeros. In a compiled model that costs nothing: the input's producer writes them.
    """

    def forward(
        self,
        input: Float[Tensor, "B C H W"],
        *,
        keep_padding: bool = False,
        bias: bool = True,
    ) -> Float[Tensor, "B D h w"]:
        """Convolve; an input that is padded already is taken as it is.

        Args:
            keep_padding: Return the output with its padding channels, which are zero.
            bias: Add the bias. Without it the bias still gets a gradient, of zeros.
        """
        pad_in, pad_out = _padding(self.in_channels), _padding(self.out_channels)
        if self.groups > 1 or not _in_16_bits(input):
            pad_in = pad_out = 0
        padded = input.shape[1] == self.in_channels + pad_in
        weight, added = self.weight, self.bias
        if added is not None and not bias:
            weight, added = weight + 0 * added.sum(), None
        if pad_in or pad_out:
            input = input if padded else F.pad(input, (0, 0, 0, 0, 0, pad_in))
            weight = F.pad(weight, (0, 0, 0, 0, 0, pad_in, 0, pad_out))
            added = None if added is None else F.pad(added, (0, pad_out))
        x = self._conv_forward(input, weight, added)
        # Not a slice, whose gradient is not in channels last: each convolution would copy it.
        return F.pad(x, (0, 0, 0, 0, 0, -pad_out)) if pad_out and not keep_padding else x


def _padding(channels: int) -> int:
    """Channels of zeros that pad `channels` to a multiple of the unit."""
    return -channels % (UNIT if channels > UNIT else UNIT_OF_IMAGES)


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

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        *,
        plus: Float[Tensor, "B D h w"] | None = None,
        drop_path: Callable[[Tensor], Tensor] | None = None,
        keep_padding: bool = False,
    ) -> Float[Tensor, "B E h w"]:
        """Return the unit's output, through `drop_path` and added to `plus` where these are given.

        Args:
            keep_padding: The output may come with padding channels, for a `Conv2d` to read.
        """
        norm, act = self.norm, batch_norm_op.name_of(self.act)
        if act is None or not (batch_norm_op.can_stand_for(norm) and self._fuses(x)):
            y = self.act(norm(self.conv(x)))
            y = y if drop_path is None else drop_path(y)
            return y if plus is None else plus[:, : y.shape[1]] + y
        # A bias before a batch norm moves the running mean and nothing else: no map is read for it.
        y = self.conv(x, keep_padding=True, bias=False)
        scale = None if drop_path is None else drop_path(y.new_ones(y.shape[0], 1, 1, 1)).flatten()
        width = y.shape[1] if keep_padding else self.conv.out_channels
        shift = self.conv.bias
        return batch_norm_op.learn(norm, y, act, width, shift=shift, plus=plus, scale=scale)

    def _fuses(self, x: Tensor) -> bool:
        """Whether what follows the convolution of `x` can run as one operator."""
        last = x.is_contiguous(memory_format=torch.channels_last)
        return type(self.conv) is Conv2d and last and _in_16_bits(x) and runs_kernels(x)

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
