"""Causal convolutions of StripedHyena 2 (2503.01868) in three forms that are equal.

A filter is its impulse response g: y[t] = sum_j g[j] u[t - j], and g[0] weighs the present. Groups
of neighbouring channels share one. Sequences are [B, T, channels].

    direct, blocked   explicit filters, as shifted sums and as products of Toeplitz matrices
    FFT               filters as long as the sequence
    recurrent         one token at a time, from the tokens or the state before it
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DIRECT = 16
"""Longest filter that is summed directly."""

CHUNK = 2**26
"""Numbers that one transform takes at a time: 256 MB in float32."""


def convolve(
    u: Float[Tensor, "B T C"],
    g: Float[Tensor, "G K"],
    before: Float[Tensor, "B K-1 C"] | None = None,
) -> Float[Tensor, "B T C"]:
    """Convolve with an explicit filter, in the form that suits its length.

    Args:
        before: The K - 1 tokens before the first, the oldest first; zeros if None.
    """
    if u.shape[1] == 1 and before is not None:
        return recurrent(u, g, before)
    return direct(u, g, before) if g.shape[1] <= DIRECT else blocked(u, g, before)


def direct(
    u: Float[Tensor, "B T C"],
    g: Float[Tensor, "G K"],
    before: Float[Tensor, "B K-1 C"] | None = None,
) -> Float[Tensor, "B T C"]:
    """Sum shifted copies, in float32 at least."""
    length, taps = u.shape[1], g.shape[1]
    exact = torch.promote_types(u.dtype, torch.float32)
    x = _preceded(u, taps - 1, before).to(exact)
    weights = per_channel(g, u.shape[2]).to(exact)
    y = x[:, taps - 1 :] * weights[:, 0]
    for j in range(1, taps):
        y = torch.addcmul(y, x[:, taps - 1 - j : taps - 1 - j + length], weights[:, j])
    return y.to(u.dtype)


def blocked(
    u: Float[Tensor, "B T C"],
    g: Float[Tensor, "G K"],
    before: Float[Tensor, "B K-1 C"] | None = None,
    *,
    block: int | None = None,
) -> Float[Tensor, "B T C"]:
    """Multiply blocks of tokens by Toeplitz matrices in two passes: y_n = T0 x_n + T1 x_(n-1).

    2503.01868, section 3: the channels of a group stand side by side, which makes matrix products
    of it. Exact, since a block is no shorter than what a filter looks back.

    Args:
        block: Tokens of a block; the power of two from K - 1 on if None.

    Raises:
        ValueError: the block is shorter than K - 1 tokens.
    """
    (batch, length, channels), (groups, taps) = u.shape, g.shape
    size = block or 1 << max(0, taps - 2).bit_length()
    if size < taps - 1:
        raise ValueError(
            f"A block of {size} tokens is shorter than the {taps - 1} that a filter of {taps} "
            f"looks back; take at least {taps - 1}."
        )
    num = -(-length // size)
    x = _preceded(u, size, before, num * size - length)  # the first block is what came before
    x = x.view(batch, num + 1, size, groups, -1).permute(3, 2, 1, 0, 4).flatten(2)
    columns = x.shape[2] // (num + 1)
    this, last = toeplitz(g.to(u.dtype), size)
    y = torch.baddbmm(torch.bmm(last, x[..., :-columns]), this, x[..., columns:])
    y = y.view(groups, size, num, batch, -1).permute(3, 2, 1, 0, 4)
    return y.reshape(batch, num * size, channels)[:, :length]


def toeplitz(
    g: Float[Tensor, "G K"], size: int
) -> tuple[Float[Tensor, "G size size"], Float[Tensor, "G size size"]]:
    """Return T0[i, j] = g[i - j], for the block itself, and T1[i, j] = g[size + i - j]."""
    padded = F.pad(g, (size - 1, 2 * size - g.shape[1]))
    windows = padded.flip(-1).unfold(-1, 2 * size, 1).flip(-2)
    return windows[..., size:], windows[..., :size]


def recurrent(
    u: Float[Tensor, "B 1 C"],
    g: Float[Tensor, "G K"],
    before: Float[Tensor, "B K-1 C"],
) -> Float[Tensor, "B 1 C"]:
    """Weigh the last K tokens: one step of a decoder."""
    window = torch.cat([before, u], dim=1).unflatten(2, (g.shape[0], -1))
    return torch.einsum("bkgr,gk->bgr", window, g.flip(1).to(u.dtype)).flatten(1)[:, None]


def fft(u: Float[Tensor, "B T C"], g: Float[Tensor, "G K"]) -> Float[Tensor, "B T C"]:
    """Convolve through Fourier transforms, in float32 at least, for some channels at a time."""
    length, channels = u.shape[1:]
    exact = torch.promote_types(u.dtype, torch.float32)
    g = per_channel(g[:, :length].to(exact), channels)
    size = fast_length(length + g.shape[1] - 1)
    parts, some = [], max(1, CHUNK // (len(u) * size))
    for first in range(0, channels, some):
        piece = slice(first, first + some)
        spectrum = torch.fft.rfft(u[..., piece].transpose(1, 2).to(exact).contiguous(), n=size)
        spectrum = spectrum * torch.fft.rfft(g[piece], n=size)
        y = torch.fft.irfft(spectrum, n=size)[..., :length]
        parts.append(y.transpose(1, 2).to(u.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def fast_length(length: int) -> int:
    """Return the next length from which small factors are quickly split."""
    return min(odd << max(0, math.ceil(math.log2(length / odd))) for odd in (1, 3, 5, 7, 9))


def per_channel(g: Float[Tensor, "G K"], channels: int) -> Float[Tensor, "C K"]:
    """Repeat each group's filter for its channels."""
    return g.repeat_interleave(channels // g.shape[0], dim=0)


def _preceded(u: Tensor, count: int, before: Tensor | None, behind: int = 0) -> Tensor:
    """Put `count` tokens in front, of which the last are `before`, and zeros behind."""
    if before is None:
        return F.pad(u, (0, 0, count, behind))
    return F.pad(torch.cat([before, u], dim=1), (0, 0, count - before.shape[1], behind))


# Sums of exponentials: g[j] = sum_n residues[n] exp(log_poles[n] j)


def modal_filter(
    log_poles: Float[Tensor, "C N"], residues: Float[Tensor, "*B C N"], length: int
) -> Float[Tensor, "*B C length"]:
    """Compute the first values of filters that are sums of exponentials.

    exp(p j) for j = a size + b is exp(p a size) exp(p b): a matrix product of order N instead of
    N exponentials a value.
    """
    size = _root(length)
    coarse = torch.arange(-(-length // size), device=log_poles.device) * size
    fine = torch.arange(size, device=log_poles.device)
    rows = torch.exp(log_poles[..., None, :] * coarse[:, None].to(log_poles))
    columns = torch.exp(log_poles[..., None] * fine.to(log_poles))
    g = (residues[..., None, :] * rows) @ columns
    return g.flatten(-2)[..., :length]


def modal_state(
    u: Float[Tensor, "B T C"],
    log_poles: Float[Tensor, "C N"],
    before: Float[Tensor, "B C N"] | None = None,
) -> Float[Tensor, "B C N"]:
    """Compute the state after the last token: S[t] = exp(log_poles) S[t-1] + u[t]."""
    batch, length, channels = u.shape
    size = _root(length)
    num = -(-length // size)
    x = F.pad(u, (0, 0, num * size - length, 0)).view(batch, num, size, channels)
    fine = torch.arange(size - 1, -1, -1, device=u.device).to(log_poles)
    coarse = (torch.arange(num - 1, -1, -1, device=u.device) * size).to(log_poles)
    x = x.permute(3, 0, 1, 2).flatten(1, 2)  # [C, B num, size]
    inside = (x @ torch.exp(log_poles[:, None, :] * fine[:, None])).unflatten(1, (batch, num))
    across = torch.exp(log_poles[:, None, :] * coarse[:, None])
    state = torch.einsum("cbjn,cjn->bcn", inside, across)
    return state if before is None else state + before * torch.exp(log_poles * length)


def _root(length: int) -> int:
    return 1 << max(0, length - 1).bit_length() // 2


def modal_step(
    u: Float[Tensor, "B 1 C"],
    log_poles: Float[Tensor, "C N"],
    residues: Float[Tensor, "C N"],
    before: Float[Tensor, "B C N"],
) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B C N"]]:
    """Take one token into the state, and read it: the recurrent form."""
    state = before * torch.exp(log_poles) + u[:, 0, :, None]
    return (state * residues).sum(-1)[:, None], state
