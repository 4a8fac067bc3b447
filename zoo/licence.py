"""Say it when weights that are not for commercial use are loaded."""

import logging

_logger = logging.getLogger("zoo")

NON_COMMERCIAL = frozenset({"nscl-nc", "nvidia-source-code-nc", "cc-by-nc-sa-4.0", "cc-by-nc-4.0"})
"""Values of `pretrained_cfg.license` that allow research only."""


def log_licence(name: str, licence: str | None) -> None:
    """Warn, through the logger `zoo`, that the weights of `name` are for research only."""
    if licence in NON_COMMERCIAL:
        _logger.warning(
            "The weights of %s are licensed for non-commercial use (%s).", name, licence
        )
