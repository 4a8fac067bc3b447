"""The last step of every entry point: build a model from its family's sizes, through timm."""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

from zoo.licence import log_licence


def build(
    family: type[nn.Module],
    name: str,
    pretrained: bool,
    *,
    filter_fn: Callable[..., dict[str, Any]],
    levels: int | tuple[int, ...] = (0, 1, 2, 3),
    **kwargs: Any,
) -> nn.Module:
    """Build a registered model as timm does; warn if its weights are for research only.

    Args:
        filter_fn: Turns a published state dict into the model's (timm's `pretrained_filter_fn`).
        levels: Levels of `forward_intermediates` that `features_only` returns by default.
        kwargs: What timm takes (`pretrained_cfg`, `features_only`, ...) and the family's own.
    """
    model = build_model_with_cfg(
        family,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=levels, feature_cls="getter"),
        **kwargs,
    )
    if pretrained:
        log_licence(model)
    return model
