"""The networks of the PHI-S experiment's teachers."""

from typing import Any

from torch import nn

from zoo.experiments.imposed import SCALES as USUAL
from zoo.experiments.phi_s.config import PhiSExperiment
from zoo.teachers.pretext import Gradients, PatchTransformer

SCALES: dict[str, dict[str, Any]] = USUAL | {"edges": USUAL["edges"] | dict(offset=4.0)}
"""Imposed on the teachers; the last one's channel means reach about ±60, as SAM's do."""


def networks(config: PhiSExperiment) -> dict[str, tuple[str, nn.Module]]:
    """Build the teachers' networks: label -> (pretext task, network)."""
    vit: dict[str, Any] = dict(
        dim=192, depth=12, num_heads=3, patch=16, mlp_ratio=4.0, size=config.size
    )
    widths, dim = (48, 96), 256
    if config.tiny:
        vit |= dict(dim=32, depth=2, num_heads=2)
        widths, dim = (16, 16), 32
    masked = vit | dict(depth=max(2, vit["depth"] // 2))
    return {
        "supervised": ("classifier", PatchTransformer(**vit)),
        "masked": ("autoencoder", PatchTransformer(**masked)),
        "edges": ("gradients", Gradients(dim, widths=widths, strides=(2, 2, 2))),
    }
