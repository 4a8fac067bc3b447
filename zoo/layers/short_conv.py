"""A convolution of each channel over three tokens, then SiLU: what a mixer does before its scan.

On a GPU one operator runs it in Triton kernels (zoo.kernels.short_conv); everywhere else plain
torch does, here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.kernels import short_conv as short_conv_op
from zoo.kernels.available import runs_kernels


def short_conv_silu(
    x: Float[Tensor, "B L C"], taps: Float[Tensor, "C 3"]
) -> tuple[Float[Tensor, "B L C//2"], Float[Tensor, "B L C//2"]]:
    """Return silu(a x_(t-1) + b x_t + c x_(t+1)) for each channel's taps a, b, c, in two halves.

    MambaVision (2407.08083), the mixer: its two convolutions are over three tokens and not causal;
    beyond the first and the last token there are zeros.

    Returns:
        The first and the last half of the channels, in the dtype of `x`.
    """
    if runs_kernels(x, taps):
        return short_conv_op.short_conv_silu(x, taps)
    return in_torch(x, taps)


def in_torch(
    x: Float[Tensor, "B L C"], taps: Float[Tensor, "C 3"]
) -> tuple[Float[Tensor, "B L C//2"], Float[Tensor, "B L C//2"]]:
    """Return the same in plain torch, on any device.

    As sums of shifted tokens, which a compiler fuses with what follows: torch's depthwise
    convolution takes 11 times as long as reading and writing the tokens does (H200).
    """
    before, here, after = taps.to(x.dtype).unbind(-1)
    x = F.pad(x, (0, 0, 1, 1))
    y = torch.addcmul(x[:, 1:-1] * here, x[:, :-2], before)
    first, last = F.silu(torch.addcmul(y, x[:, 2:], after)).chunk(2, dim=-1)
    return first, last
