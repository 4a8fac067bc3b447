"""What the configurations for mmdet and mmseg have in common."""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn


def backbone_fields(backbone: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Backbone` for a model's name (with a tag: with its weights)."""
    if isinstance(backbone, str):
        return dict(name=backbone, pretrained="." in backbone or ":" in backbone)
    return dict(backbone)


def finish_config(
    config: Any, *, plugin: str, seed: int, out: str | Path, overrides: Mapping[str, Any] | None
) -> None:
    """Set what is the same in every run, then the user's own values.

    Args:
        plugin: The module that registers our parts with mmengine.
        overrides: Values by dotted keys of the configuration.
    """
    config.merge_from_dict(
        dict(
            custom_imports=dict(imports=[plugin]),
            custom_hooks=[dict(type="zoo.PlainCheckpoint")],
            randomness=dict(seed=seed),
            work_dir=str(out),
        )
    )
    config.merge_from_dict(dict(overrides or {}))


def refuse_unreadable(names: Iterable[str], package: str) -> None:
    """Raise a ValueError if images cannot be read: the packages' own readers would stop at them."""
    if names := sorted(names):
        raise ValueError(
            f"{len(names)} images cannot be read, {names[0]} first, and {package} stops at such; "
            "remove them."
        )


def build_model(config: Any, package: str) -> nn.Module:
    """Build the model of a configuration of mmdet or mmseg, as mmengine's runner does."""
    for plugin in config.custom_imports.imports:  # first, since they supply mmcv's operations
        importlib.import_module(plugin)
    from mmengine.logging import MMLogger  # pyright: ignore[reportMissingImports]
    from mmengine.registry import init_default_scope  # pyright: ignore[reportMissingImports]

    MMLogger.get_current_instance().setLevel(
        "WARNING"
    )  # otherwise it logs the initialisation of each weight
    init_default_scope(package)
    model = importlib.import_module(f"{package}.registry").MODELS.build(config.model)
    model.init_weights()
    return model
