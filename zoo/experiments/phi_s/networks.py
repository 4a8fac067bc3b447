"""The networks of the PHI-S experiment's teachers."""

from typing import Any

from torch import nn

from zoo.experiments.phi_s.config import PhiSExperiment
from zoo.teachers.pretext import Gradients, PatchTransformer


def networks(config: PhiSExperiment) -> dict[str, tuple[str, nn.Module]]:
    """Build the teachers' networks: label -> (pretext task, network).

    Scales: 0.03, 1.35 and 5.5 overall, log-normal gains of σ = 0.6, offsets; the last one's
    channel means reach about ±60, as SAM's do (2410.01680, table 7).
    """
    vit: dict[str, Any] = dict(
        dim=192, depth=12, num_heads=3, patch=16, mlp_ratio=4.0, size=config.size
    )
    widths, dim = (48, 96), 256
    if config.tiny:
        vit |= dict(dim=32, depth=2, num_heads=2)
        widths, dim = (16, 16), 32
    masked = vit | dict(depth=max(2, vit["depth"] // 2))
    return {
        "supervised": ("classifier", PatchTransformer(**vit, std=0.03, seed=1)),
        "masked": ("autoencoder", PatchTransformer(**masked, std=1.35, seed=2)),
        "edges": ("gradients", Gradients(dim, widths=widths, strides=(2, 2, 2), offset=4.0)),
    }
