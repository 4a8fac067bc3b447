"""Warn when weights that are not for commercial use are loaded."""

import logging

from torch import nn

_logger = logging.getLogger("zoo")

NON_COMMERCIAL = frozenset({"nscl-nc", "nvidia-source-code-nc", "cc-by-nc-sa-4.0", "cc-by-nc-4.0"})
"""Values of `pretrained_cfg.license` that allow research only."""


def log_licence(model: nn.Module) -> None:
    """Warn, through the logger `zoo`, if the weights loaded into `model` are for research only.

    Their licence is that of its `pretrained_cfg`; a model built without timm has none.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    if cfg.get("license") in NON_COMMERCIAL:
        _logger.warning(
            "The weights of %s are licensed for non-commercial use (%s).",
            cfg.get("architecture") or type(model).__name__,
            cfg["license"],
        )
