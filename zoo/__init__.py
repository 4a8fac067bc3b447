"""A zoo of vision backbones, and the distillation of many frozen teachers into one of them.

`import zoo` tells timm the names of the families here, and torch's compiler to leave one thing be
that ruins gradients (`zoo.layers.compiler`). It does nothing else.
"""

from typing import Any

import timm
import torch
from torch import nn

import zoo.rooms  # noqa: F401  a clone without symbolic links gets one clear error
from zoo import eradio, fastervit, mambavision, radio
from zoo.compiled_blocks import compile_blocks
from zoo.layers.compiler import keep_strides
from zoo.safe_pickle import PLAIN

keep_strides()

FAMILIES = (eradio, fastervit, mambavision, radio)

__version__ = "0.1.0"
__all__ = ["FAMILIES", "__version__", "compile_blocks", "create_model", "list_models"]


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build any model that timm knows, ours among them: `timm.create_model`, and one thing more.

    A file of weights (`checkpoint_path`, or `file` in `pretrained_cfg_overlay`) may hold plain data
    beside its tensors, as the arguments of the run that wrote it: paths, numpy's numbers,
    namespaces, dates (`zoo.safe_pickle`). timm alone refuses such a file. Either way nothing in it
    is executed.
    """
    with torch.serialization.safe_globals(PLAIN):
        return timm.create_model(model_name, pretrained, **kwargs)


def list_models(filter: str = "") -> list[str]:
    """List the models of zoo's own families, as `timm.list_models` does for all.

    Args:
        filter: A shell pattern such as `"eradio*"`.
    """
    modules = [family.__name__.rpartition(".")[2] for family in FAMILIES]
    return sorted(name for module in modules for name in timm.list_models(filter, module=module))
