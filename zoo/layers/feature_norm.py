"""Fixed affine maps at the two ends of a backbone: on its pixels, and on its tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class InputConditioner(nn.Module):
    """Normalise images in [0, 1] by a mean and a deviation for each channel."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, device=None, dtype=None):
        super().__init__()
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        self.register_buffer("norm_mean", torch.tensor(mean, **like).view(-1, 1, 1))
        self.register_buffer("norm_std", torch.tensor(std, **like).view(-1, 1, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return (x - self.norm_mean) / self.norm_std


class FeatureNormalizer(nn.Module):
    """y = (x − mean) txᵀ on patch tokens: a fixed transform, PHI-S (2410.01680) as a rule."""

    mean: Tensor
    tx: Tensor

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        self.register_buffer("mean", torch.zeros(dim, **like))
        self.register_buffer("tx", torch.eye(dim, **like))

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        return (x - self.mean) @ self.tx.T


class IntermediateNormalizer(nn.Module):
    """For each layer i, y = (x − mean_i) R_iᵀ on patch tokens, and a scalar α_i.

    Args:
        per_layer: A rotation for each layer instead of one for all.
    """

    alphas: Tensor
    means: Tensor
    rotation: Tensor

    def __init__(self, layers: int, dim: int, *, per_layer: bool = False, device=None, dtype=None):
        super().__init__()
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        rotation = torch.eye(dim, **like)
        self.register_buffer("alphas", torch.ones(layers, **like))
        self.register_buffer("means", torch.zeros(layers, dim, **like))
        self.register_buffer("rotation", rotation.repeat(layers, 1, 1) if per_layer else rotation)

    def centred(self, x: Float[Tensor, "B N C"], layer: int) -> Float[Tensor, "B N C"]:
        """Subtract the layer's mean; `rotated` follows, once for all layers of a group."""
        return x - self.means[layer]

    def rotated(self, x: Float[Tensor, "B N C"], layer: int) -> Float[Tensor, "B N C"]:
        """Apply the rotation of `layer`, or the one of all layers."""
        rotation = self.rotation if self.rotation.ndim == 2 else self.rotation[layer]
        return x @ rotation.T
