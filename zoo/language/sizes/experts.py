"""Decoders with experts in place of the MLP: Mixtral, Qwen3-MoE."""

from typing import Any

from zoo.language.sizes.dense import SMALL, TINY
from zoo.language.sizes.family import Family, Fields, Size, attention, gated

# ---------------------------------------------------------------- Mixtral (2401.04088)


def _mixtral(dim: int) -> dict[str, Any]:
    return dict(hidden_size=dim, intermediate_size=gated(dim), **attention(dim))


def _mixtral8(dim: int, ffn: int, depth: int, heads: int, context: int) -> Fields:
    return dict(
        hidden_size=dim, intermediate_size=ffn, num_hidden_layers=depth, num_attention_heads=heads,
        max_position_embeddings=context,
    )  # fmt: skip


EXPERTS = dict(num_local_experts=8, num_experts_per_tok=2)
MIXTRAL = Family(
    name="mixtral",
    config="MixtralConfig",
    widths=_mixtral,
    tiny=Size(96_736, _mixtral(32) | TINY | dict(num_local_experts=4, num_experts_per_tok=2)),
    laptop=Size(18_230_016, _mixtral(256) | SMALL | EXPERTS | dict(num_hidden_layers=4)),
    sizes=dict(
        mixtral_8x7b=Size(
            46_702_792_704,
            _mixtral8(4096, 14336, 32, 32, 32768),
            "mistralai/Mixtral-8x7B-v0.1",
            "apache-2.0",
        ),
        mixtral_8x22b=Size(
            140_620_634_112,
            _mixtral8(6144, 16384, 56, 48, 65536),
            "mistralai/Mixtral-8x22B-v0.1",
            "apache-2.0",
        ),
    ),
)

# ---------------------------------------------------------------- Qwen3-MoE (2505.09388)


def _qwen3_moe(dim: int) -> dict[str, Any]:
    return dict(
        hidden_size=dim, intermediate_size=gated(dim), moe_intermediate_size=dim // 2,
        norm_topk_prob=True, **attention(dim),
    )  # fmt: skip


def _a_few_b(dim: int, depth: int, heads: int, expert: int) -> Fields:
    return dict(
        hidden_size=dim, intermediate_size=6 * dim // 2, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
        moe_intermediate_size=expert, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=40960, bos_token_id=151643, eos_token_id=151645,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )  # fmt: skip


QWEN3_MOE = Family(
    name="qwen3_moe",
    config="Qwen3MoeConfig",
    widths=_qwen3_moe,
    tiny=Size(35_328, _qwen3_moe(32) | TINY | dict(num_experts=4, num_experts_per_tok=2)),
    laptop=Size(
        10_777_088,
        _qwen3_moe(256) | SMALL | dict(num_hidden_layers=6, num_experts=16, num_experts_per_tok=4),
    ),
    sizes=dict(
        qwen3_30b_a3b=Size(
            30_532_122_624, _a_few_b(2048, 48, 32, 768), "Qwen/Qwen3-30B-A3B", "apache-2.0"
        ),
        qwen3_235b_a22b=Size(
            235_093_634_560, _a_few_b(4096, 94, 64, 1536), "Qwen/Qwen3-235B-A22B", "apache-2.0"
        ),
    ),
)

WITH_EXPERTS = (MIXTRAL, QWEN3_MOE)
