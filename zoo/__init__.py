"""A zoo of vision backbones, and the distillation of many frozen teachers into one of them.

`import zoo` tells timm the names of the families here and does nothing else.
"""

import timm
from timm import create_model

from zoo import eradio, fastervit, mambavision, radio

FAMILIES = (eradio, fastervit, mambavision, radio)

__version__ = "0.1.0"
__all__ = ["FAMILIES", "__version__", "create_model", "list_models"]


def list_models(filter: str = "") -> list[str]:
    """List the models of zoo's own families, as `timm.list_models` does for all.

    Args:
        filter: A shell pattern such as `"eradio*"`.
    """
    modules = [family.__name__.rpartition(".")[2] for family in FAMILIES]
    return sorted(name for module in modules for name in timm.list_models(filter, module=module))
