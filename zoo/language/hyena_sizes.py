"""The published shapes of StripedHyena 2, as data: names and the fields of `HyenaConfig`."""

from typing import Any

_7B = dict(
    hidden_size=4096, num_attention_heads=32, pattern="smlasml" * 4 + "smla", se_groups=256,
    mr_groups=256, rotary_base=10_000.0,
)  # fmt: skip
_40B = dict(
    hidden_size=8192, num_attention_heads=64,
    pattern="smlasml" * 4 + "smla" * 2 + "smlsmla" * 2, se_groups=512, mr_groups=512,
    rotary_base=1_000_000.0,
)  # fmt: skip


def _context(divisor: int) -> dict[str, Any]:
    """Positions are divided so that longer contexts use the angles of 8,192 tokens."""
    return dict(max_position_embeddings=8192 * divisor, rotary_divisor=float(divisor))


SIZES: dict[str, dict[str, Any]] = {
    "hyena_1b": dict(
        hidden_size=1920, num_attention_heads=15, intermediate_size=5120,
        pattern="smlasml" * 3 + "smla", se_groups=128, mr_groups=128, rotary_base=10_000.0,
        **_context(1),
    ),
    "hyena_7b": dict(**_7B, intermediate_size=11_008, **_context(1)),
    "hyena_7b_262k": dict(**_7B, intermediate_size=11_008, **_context(32)),
    "hyena_7b_1m": dict(**_7B, intermediate_size=11_264, **_context(128)),
    "hyena_20b": dict(
        hidden_size=8192, num_attention_heads=64, intermediate_size=22_528,
        pattern="smlasml" * 3 + "sml", se_groups=512, mr_groups=512, rotary_base=1_000_000.0,
        **_context(128),
    ),
    "hyena_40b": dict(**_40B, intermediate_size=21_888, **_context(1)),
    "hyena_40b_1m": dict(**_40B, intermediate_size=22_528, **_context(128)),
}  # fmt: skip
"""Evo 2's: 1B, 7B (8k and 262k tokens; 1m is wider), 20B, 40B (8k; 1m is wider)."""
