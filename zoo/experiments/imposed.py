"""Scales like those of large teachers, imposed on the features of small ones.

Three small networks that are trained in one way have too similar statistics to show what unequal
teachers do. Directions and ranks stay the networks' own.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Features


class Imposed(nn.Module):
    """Impose scales and offsets like a large teacher's on a map's channels; fixed, not learnt.

    Args:
        dim: Channels of the map.
        std: Overall standard deviation that the features get.
        spread: Standard deviation of the logarithm of the channels' gains.
        offset: Standard deviation of the channels' means, in units of `std`.
        seed: Decides gains and offsets.
    """

    gain: Tensor
    offset: Tensor
    own_mean: Tensor
    own_std: Tensor

    def __init__(self, dim: int, *, std: float, spread: float, offset: float, seed: int):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        gain = torch.exp(spread * torch.randn(dim, generator=draws, device="cpu"))
        self.register_buffer("gain", std * gain / gain.square().mean().sqrt())
        self.register_buffer(
            "offset", offset * std * torch.randn(dim, generator=draws, device="cpu")
        )
        self.register_buffer("own_mean", torch.zeros(dim))
        self.register_buffer("own_std", torch.ones(()))

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "B H W C"]) -> None:
        """Keep the features' own mean and overall deviation, which the imposed ones replace."""
        self.own_mean.copy_(x.mean(dim=(0, 1, 2)))
        self.own_std.copy_((x - self.own_mean).square().mean().sqrt())

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return (x - self.own_mean) / self.own_std * self.gain + self.offset


SCALES: dict[str, dict[str, Any]] = {
    "supervised": dict(std=0.03, spread=0.6, offset=0.5, seed=1),
    "masked": dict(std=1.35, spread=0.6, offset=0.5, seed=2),
    "edges": dict(std=5.5, spread=0.6, offset=1.5, seed=3),
}
"""Of DFN CLIP, DINOv2 and SAM (PHI-S, 2410.01680, table 7), by the teacher that gets them."""


class WithScale(nn.Module):
    """A network whose map has an imposed scale; its summary stays as it is."""

    def __init__(self, network: nn.Module, scale: Imposed):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        summary, spatial = self.network(x)
        return Features(summary, self.scale(spatial))
