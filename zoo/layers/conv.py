"""Convolution, batch norm and activation as one unit that can be folded."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.kernels import batch_norm as batch_norm_op
from zoo.kernels.available import runs_kernels

UNIT = 16
"""Channels that the GPU's convolutions take at once: 208 and 400 run faster than 200 and 392."""

UNIT_OF_IMAGES = 8
"""The same for the few channels of an image."""


class Conv2d(nn.Conv2d):
    """torch's convolution, with channels that tensor cores can read.

    Widths that 16 does not divide, as the 196 and 392 of the large models, run on a GPU in 16 bits
    up to three times slower than those that it does (H200), so there both sides are filled up with
    zeros. In a compiled model that costs nothing: the producer of the input writes the zeros.
    """

    def forward(
        self,
        input: Float[Tensor, "B C H W"],
        *,
        fill: bool = False,
        bias: bool = True,
    ) -> Float[Tensor, "B D h w"]:
        """Convolve; an input that is filled up already is taken as it is.

        Args:
            fill: Leave the channels that fill up the output where they are.
            bias: Add the bias. Otherwise its gradient is zero, not missing.
        """
        more_in, more_out = _more(self.in_channels), _more(self.out_channels)
        if self.groups > 1 or not _in_16_bits(input):
            more_in = more_out = 0
        filled = input.shape[1] == self.in_channels + more_in
        weight, added = self.weight, self.bias
        if added is not None and not bias:
            weight, added = weight + 0 * added.sum(), None
        if more_in or more_out:
            input = input if filled else F.pad(input, (0, 0, 0, 0, 0, more_in))
            weight = F.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
            added = None if added is None else F.pad(added, (0, more_out))
        x = self._conv_forward(input, weight, added)
        # Not a slice: its backward would leave channels last, and each convolution would copy.
        return F.pad(x, (0, 0, 0, 0, 0, -more_out)) if more_out and not fill else x


def _more(channels: int) -> int:
    """Channels that fill up `channels`."""
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
        fill: bool = False,
    ) -> Float[Tensor, "B E h w"]:
        """Return the unit's output, or add it to `plus`, through `drop_path`.

        Args:
            fill: The output may come filled up, for a `Conv2d` that takes it so.
        """
        norm, act = self.norm, batch_norm_op.name_of(self.act)
        if act is None or not (batch_norm_op.can_stand_for(norm) and self._fuses(x)):
            y = self.act(norm(self.conv(x)))
            y = y if drop_path is None else drop_path(y)
            return y if plus is None else plus[:, : y.shape[1]] + y
        # A bias before a batch norm moves the running mean and nothing else: no map is read for it.
        y = self.conv(x, fill=True, bias=False)
        scale = None if drop_path is None else drop_path(y.new_ones(y.shape[0], 1, 1, 1)).flatten()
        width = y.shape[1] if fill else self.conv.out_channels
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
