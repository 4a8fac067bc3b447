"""The last step of every entry point: from a family's sizes to a model, through timm."""

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
    """Build a registered model as timm does, and say so if its weights are for research only.

    Args:
        filter_fn: Makes a published state dict fit the model (timm's `pretrained_filter_fn`).
        levels: Of `forward_intermediates`: what `features_only` gives without `out_indices`.
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
