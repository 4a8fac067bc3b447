"""Convolution, batch norm and activation as one unit that can be folded."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
        self.conv = nn.Conv2d(
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
