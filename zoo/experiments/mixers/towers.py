"""The towers: plain objects of transformers with equally many parameters."""

from typing import Any

import torch

from zoo.compiled_blocks import allow_variants
from zoo.experiments.fast_mamba import fast
from zoo.experiments.mixers.config import Scale
from zoo.language.towers import create_language_model

STEP = 16
"""Widths of feed-forward layers are multiples of it."""
FAMILIES = dict(
    attention="llama", mamba2="mamba2", hybrid="nemotron_h", hyena="hyena", hyena_only="hyena"
)


def build(tower: str, scale: Scale, *, positions: int | None = None) -> Any:
    """Build a tower over bytes, with random weights.

    Its feed-forward layers are as wide as makes it as large as the Mamba-2, which has none.

    Args:
        positions: Most tokens of a text; the rows' length by default.
    """
    fields = _fields(tower, scale, positions or scale.length)
    if tower != "mamba2":
        fields["intermediate_size"] = _width(tower, fields, _count("mamba2", scale))
    return create_language_model(FAMILIES[tower], **fields)


def count(model: Any) -> int:
    """Count a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def _count(tower: str, scale: Scale) -> int:
    with torch.device("meta"):
        return count(build(tower, scale))


def _width(tower: str, fields: dict[str, Any], wanted: int) -> int:
    """Return the width with which a tower's parameters, linear in it, are nearest to a number."""
    with torch.device("meta"):
        first, second = (
            count(create_language_model(FAMILIES[tower], **fields, intermediate_size=n * STEP))
            for n in (1, 2)
        )
    return STEP * max(1, 1 + round((wanted - first) / (second - first)))


def _fields(tower: str, scale: Scale, positions: int) -> dict[str, Any]:
    common = dict(d_model=scale.dim, max_position_embeddings=positions)
    heads = dict(
        num_attention_heads=scale.heads, num_key_value_heads=scale.key_heads,
        head_dim=scale.dim // scale.heads,
    )  # fmt: skip
    ssm_heads = 2 * scale.dim // scale.channels
    if tower == "attention":
        return dict(**common, **heads, num_hidden_layers=scale.attention_layers)
    if tower == "mamba2":
        return dict(
            d_model=scale.dim, num_hidden_layers=scale.mamba_layers, num_heads=ssm_heads,
            head_dim=scale.channels, state_size=scale.state, n_groups=1,
        )  # fmt: skip
    if tower == "hybrid":
        return dict(
            **common, **heads, pattern=scale.hybrid, mamba_num_heads=ssm_heads,
            mamba_head_dim=scale.channels, ssm_state_size=scale.state, n_groups=1,
        )  # fmt: skip
    pattern = scale.hyena if tower == "hyena" else scale.hyena_only
    return dict(
        **common, pattern=pattern, num_attention_heads=scale.heads, se_groups=scale.groups,
        mr_groups=scale.groups,
    )  # fmt: skip


def quickened(model: Any, *, compiled: bool) -> Any:
    """Let a tower run as fast as it can, and return it: what it computes stays.

    Args:
        compiled: Compile each kind of layer.
    """
    if compiled:
        allow_variants()
    if model.config.model_type in ("mamba2", "nemotron_h"):
        return fast(model, compiled=compiled)
    for layer in model.base_model.layers if compiled else ():
        layer.compile(dynamic=False)
    return model
