"""Warn when weights that are not for commercial use are loaded."""

import logging

from torch import nn

_logger = logging.getLogger("zoo")

NON_COMMERCIAL = frozenset(
    {
        "nscl-nc",
        "nvidia-source-code-nc",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-4.0",
        "nvidia-internal-scientific-research-and-development-model-license",
    }
)
"""Licences that allow research only: of `pretrained_cfg.license`, and of language models."""


def log_licence(model: nn.Module) -> None:
    """Warn, through the logger `zoo`, if the weights loaded into `model` are for research only.

    Their licence is that of its `pretrained_cfg`; a model built without timm has none.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    warn_of(cfg.get("architecture") or type(model).__name__, cfg.get("license"))


def warn_of(name: str, licence: str | None) -> None:
    """Warn, through the logger `zoo`, if a licence is for research only."""
    if licence in NON_COMMERCIAL:
        message = "The weights of %s are licensed for non-commercial use (%s)."
        _logger.warning(message, name, licence)
