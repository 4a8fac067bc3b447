"""Decoders with state-space layers, alone or beside attention: Mamba-2, Nemotron-H, Zamba2,
Falcon-H1, Granite 4 hybrid.

The published sizes are shapes. Falcon-H1 and Granite also multiply what passes by constants, for
maximal update parametrisation; these come with the configuration of their released weights, and are
1 where weights are random. Bamba is left out: its cached logits differ from the full ones by 3e-3
(transformers 5.23).
"""

from typing import Any

from zoo.language.sizes.dense import SMALL, TINY
from zoo.language.sizes.family import BYTES, Family, Fields, Size, attention, gated, ssm

# ---------------------------------------------------------------- Mamba-2 (2405.21060, 2406.07887)


def _mamba2(dim: int) -> dict[str, Any]:
    heads, channels, state = ssm(dim)
    return dict(hidden_size=dim, num_heads=heads, head_dim=channels, state_size=state, n_groups=2)


def _mamba2_pile(dim: int, depth: int) -> Fields:
    return dict(
        vocab_size=50288, hidden_size=dim, num_hidden_layers=depth, num_heads=2 * dim // 64,
        n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip


def _on_pile(parameters: int, dim: int, depth: int) -> Size:
    # Released in mamba_ssm's form, which transformers does not read.
    return Size(parameters, _mamba2_pile(dim, depth), "", "apache-2.0")


MAMBA2 = Family(
    name="mamba2",
    config="Mamba2Config",
    widths=_mamba2,
    state_space=("num_heads", "n_groups"),
    tiny=Size(34_616, _mamba2(32) | BYTES | dict(num_hidden_layers=2, chunk_size=8)),
    laptop=Size(3_855_296, _mamba2(256) | BYTES | dict(num_hidden_layers=8, chunk_size=64)),
    sizes=dict(
        mamba2_130m=_on_pile(128_989_632, 768, 24),
        mamba2_370m=_on_pile(368_346_624, 1024, 48),
        mamba2_780m=_on_pile(780_161_280, 1536, 48),
        mamba2_1_3b=_on_pile(1_343_757_312, 2048, 48),
        mamba2_2_7b=_on_pile(2_702_599_680, 2560, 64),
        # 2406.07887, table 1; released in Megatron's form.
        mamba2_8b=Size(
            8_236_999_680, dict(vocab_size=256000, num_hidden_layers=56), "", "apache-2.0"
        ),
        mamba_codestral_7b=Size(
            7_285_403_648,
            dict(num_hidden_layers=64),
            "mistralai/Mamba-Codestral-7B-v0.1",
            "apache-2.0",
        ),
    ),
)

# ---------------------------------------------------------------- Nemotron-H (2504.03624)


def _nemotron_h(dim: int) -> dict[str, Any]:
    heads, channels, state = ssm(dim)
    return dict(
        hidden_size=dim, intermediate_size=4 * dim, **attention(dim), mamba_num_heads=heads,
        mamba_head_dim=channels, ssm_state_size=state, n_groups=2, n_routed_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=dim, moe_shared_expert_intermediate_size=dim,
    )  # fmt: skip


EIGHT = "M-M-M-M*" + "-M-M-M-M-M*" * 3 + "-M-M-M-M-M-"
FIFTY_SIX = "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-"
FORTY_SEVEN = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
    "-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
)
STUDY = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
NINE = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
THIRTY = "MEMEM*" + "EMEMEM*" * 4 + "EMEMEMEM*" + "EMEMEMEME"

SCIENTIFIC = "nvidia-internal-scientific-research-and-development-model-license"


def _h(pattern: str, dim: int, ffn: int, ssm_heads: int, context: int, **fields: Any) -> Fields:
    return dict(
        pattern=pattern, hidden_size=dim, intermediate_size=ffn, mamba_num_heads=ssm_heads,
        max_position_embeddings=context, **fields,
    )  # fmt: skip


LARGE = dict(num_attention_heads=64, ssm_state_size=256)
NEMOTRON_H = Family(
    name="nemotron_h",
    config="NemotronHConfig",
    widths=_nemotron_h,
    letters={"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"},
    needs="*",
    kinds="layers_block_type",
    state_space=("mamba_num_heads", "n_groups"),
    tiny=Size(
        47_276,
        _nemotron_h(32)
        | BYTES
        | dict(pattern="M-*E", n_routed_experts=4, max_position_embeddings=512, chunk_size=8),
    ),
    laptop=Size(5_475_448, _nemotron_h(256) | SMALL | dict(pattern="M-M*-M-M*-M-", chunk_size=64)),
    sizes=dict(
        # 2406.07887, the study's 8B hybrid; released in Megatron's form.
        mamba2_hybrid_8b=Size(
            8_654_517_248, _h(STUDY, 4096, 16384, 128, 4096, vocab_size=256000), "", "apache-2.0"
        ),
        nemotron_h_4b=Size(
            4_489_223_040, _h(EIGHT, 3072, 12288, 112, 8192), "nvidia/Nemotron-H-4B-Base-8K",
            SCIENTIFIC,
        ),
        nemotron_h_8b=Size(
            8_100_852_736, _h(EIGHT, 4096, 21504, 128, 8192), "nvidia/Nemotron-H-8B-Base-8K",
            SCIENTIFIC,
        ),
        nemotron_h_47b=Size(
            46_791_554_816, _h(FORTY_SEVEN, 8192, 30720, 256, 8192, **LARGE),
            "nvidia/Nemotron-H-47B-Base-8K", SCIENTIFIC,
        ),
        nemotron_h_56b=Size(
            56_324_350_464, _h(FIFTY_SIX, 8192, 32768, 256, 8192, **LARGE),
            "nvidia/Nemotron-H-56B-Base-8K", SCIENTIFIC,
        ),
        nemotron_nano2_9b=Size(
            8_888_227_328,
            _h(NINE, 4480, 15680, 128, 131072, mamba_head_dim=80, num_attention_heads=40),
            "nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base", "nvidia-open-model-license",
        ),
        nemotron3_nano_30b_a3b=Size(
            31_577_937_344,
            _h(
                THIRTY, 2688, 1856, 64, 262144, num_key_value_heads=2, n_routed_experts=128,
                num_experts_per_tok=6, moe_intermediate_size=1856, routed_scaling_factor=2.5,
                moe_shared_expert_intermediate_size=3712,
            ),
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16", "nvidia-open-model-license",
        ),
    ),
)  # fmt: skip

# ---------------------------------------------------------------- Zamba2 (2411.15242)


def _zamba2(dim: int) -> dict[str, Any]:
    heads, _, state = ssm(dim)
    return dict(
        hidden_size=dim, intermediate_size=4 * dim, num_attention_heads=max(4, dim // 64),
        num_key_value_heads=None, n_mamba_heads=heads, mamba_d_state=state, mamba_ngroups=2,
        adapter_rank=max(4, dim // 16),
    )  # fmt: skip


def _zamba(pattern: str, dim: int, ssm_heads: int, **fields: Any) -> Fields:
    return dict(
        pattern=pattern, hidden_size=dim, n_mamba_heads=ssm_heads, max_position_embeddings=4096,
        **fields,
    )  # fmt: skip


ZAMBA2 = Family(
    name="zamba2",
    config="Zamba2Config",
    widths=_zamba2,
    letters={"M": "linear_attention", "H": "hybrid"},
    needs="H",
    kinds="layers_block_type",
    state_space=("n_mamba_heads", "mamba_ngroups"),
    tiny=Size(
        75_600,
        _zamba2(32) | BYTES | dict(pattern="MHMH", max_position_embeddings=512, chunk_size=8),
    ),
    laptop=Size(5_699_008, _zamba2(256) | SMALL | dict(pattern="MMHMMHMM", chunk_size=64)),
    sizes=dict(
        zamba2_1_2b=Size(
            1_215_064_704,
            _zamba(
                "MMMMMH" * 6 + "MM", 2048, 64, mamba_d_state=128, use_mem_rope=True,
                use_shared_attention_adapter=True,
            ),
            "Zyphra/Zamba2-1.2B", "apache-2.0",
        ),
        zamba2_2_7b=Size(
            2_662_214_560,
            _zamba("M" + "MMMMMH" * 7 + "MMMMH" + "MMMH" + "MM", 2560, 80, num_mem_blocks=2),
            "Zyphra/Zamba2-2.7B", "apache-2.0",
        ),
        zamba2_7b=Size(
            7_356_749_648,
            _zamba(
                "MMMMMMH" + "MMMMH" + "MMMMMH" * 11 + "MMM", 3584, 112, mamba_ngroups=2,
                num_mem_blocks=2, use_mem_rope=True,
            ),
            "Zyphra/Zamba2-7B", "apache-2.0",
        ),
    ),
)  # fmt: skip

# ---------------------------------------------------------------- Falcon-H1 (2507.22448)


def _falcon_h1(dim: int) -> dict[str, Any]:
    heads, channels, state = ssm(dim)
    return dict(
        hidden_size=dim, intermediate_size=gated(dim), **attention(dim), mamba_d_ssm=2 * dim,
        mamba_n_heads=heads, mamba_d_head=channels, mamba_d_state=state, mamba_n_groups=2,
    )  # fmt: skip


def _h1(
    dim: int, ffn: int, depth: int, heads: int, kv: int, head_dim: int, ssm_heads: int,
    channels: int, vocabulary: int, context: int, **fields: Any,
) -> Fields:  # fmt: skip
    return dict(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim,
        mamba_d_ssm=ssm_heads * channels, mamba_n_heads=ssm_heads, mamba_d_head=channels,
        mamba_norm_before_gate=False, max_position_embeddings=context,
        rope_parameters=dict(rope_type="default", rope_theta=1e11), **fields,
    )  # fmt: skip


def _h1_released(parameters: int, name: str, fields: Fields) -> Size:
    return Size(parameters, fields, f"tiiuae/Falcon-H1-{name}-Base", "falcon-llm-license")


FALCON_H1 = Family(
    name="falcon_h1",
    config="FalconH1Config",
    widths=_falcon_h1,
    state_space=("mamba_n_heads", "mamba_n_groups"),
    tiny=Size(59_128, _falcon_h1(32) | TINY | dict(mamba_chunk_size=8)),
    laptop=Size(
        7_346_576, _falcon_h1(256) | SMALL | dict(num_hidden_layers=6, mamba_chunk_size=64)
    ),
    sizes=dict(
        falcon_h1_0_5b=_h1_released(
            521_411_104, "0.5B",
            _h1(1024, 2048, 36, 8, 2, 64, 24, 64, 32784, 16384, mamba_d_state=128),
        ),
        falcon_h1_1_5b_deep=_h1_released(
            1_554_770_832, "1.5B-Deep", _h1(1280, 3072, 66, 6, 2, 128, 24, 64, 65536, 131072)
        ),
        falcon_h1_7b=_h1_released(
            7_585_513_568, "7B", _h1(3072, 12288, 44, 12, 2, 128, 24, 128, 130048, 262144)
        ),
        falcon_h1_34b=_h1_released(
            33_642_221_312, "34B",
            _h1(5120, 21504, 72, 20, 4, 128, 32, 128, 261120, 262144, mamba_n_groups=2),
        ),
    ),
)  # fmt: skip

# ---------------------------------------------------------------- Granite 4 hybrid


def _granite(dim: int) -> dict[str, Any]:
    heads, channels, state = ssm(dim)
    return dict(
        hidden_size=dim, intermediate_size=dim, shared_intermediate_size=2 * dim,
        num_attention_heads=max(4, dim // 128 // 2 * 2),
        num_key_value_heads=max(2, dim // 128 // 2), mamba_n_heads=heads, mamba_d_head=channels,
        mamba_d_state=state, mamba_n_groups=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip


FOUR_OF_FORTY = "MMMMM*" + "MMMMMMMMM*" * 3 + "MMMM"
FOUR_OF_32 = "M" * 10 + "*MM*MMM*" + "M" * 9 + "*MMMM"


def _granite4(
    name: str, parameters: int, pattern: str, dim: int, heads: tuple[int, int, int],
    ffn: tuple[int, int, int, int], context: int = 131072,
) -> Size:  # fmt: skip
    """`heads`: of queries, of keys, of the state-space layers; `ffn`: the shared width, that of an
    expert, their number, and how many a token meets."""
    shared, expert, experts, met = ffn
    fields = dict(
        pattern=pattern, vocab_size=100352, hidden_size=dim, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], mamba_n_heads=heads[2], mamba_d_state=128,
        shared_intermediate_size=shared, intermediate_size=expert, num_local_experts=experts,
        num_experts_per_tok=met, tie_word_embeddings=True, max_position_embeddings=context,
        rms_norm_eps=1e-5, bos_token_id=100257, eos_token_id=100257,
    )  # fmt: skip
    return Size(parameters, fields, f"ibm-granite/granite-4.0-{name}-base", "apache-2.0")


GRANITE_MOE_HYBRID = Family(
    name="granitemoehybrid",
    config="GraniteMoeHybridConfig",
    widths=_granite,
    letters={"M": "linear_attention", "*": "full_attention"},
    state_space=("mamba_n_heads", "mamba_n_groups"),
    tiny=Size(
        65_836,
        _granite(32)
        | BYTES
        | dict(pattern="M*", num_local_experts=4, max_position_embeddings=512, mamba_chunk_size=8),
    ),
    laptop=Size(14_466_168, _granite(256) | SMALL | dict(pattern="MM*MMM", mamba_chunk_size=64)),
    sizes=dict(
        granite4_h_350m=_granite4(
            "h-350m", 340_332_224, FOUR_OF_32, 768, (12, 4, 48), (2048, 2048, 0, 0), 32768
        ),
        granite4_h_1b=_granite4(
            "h-1b", 1_461_538_368, FOUR_OF_FORTY, 1536, (12, 4, 48), (4096, 4096, 0, 0)
        ),
        granite4_h_micro=_granite4(
            "h-micro", 3_191_396_096, FOUR_OF_FORTY, 2048, (32, 8, 64), (8192, 8192, 0, 0)
        ),
        granite4_h_tiny=_granite4(
            "h-tiny", 6_939_037_248, FOUR_OF_FORTY, 1536, (12, 4, 48), (1024, 512, 64, 6)
        ),
        granite4_h_small=_granite4(
            "h-small", 32_207_337_984, FOUR_OF_FORTY, 4096, (32, 8, 128), (1536, 768, 72, 10)
        ),
    ),
)

HYBRID = (MAMBA2, NEMOTRON_H, ZAMBA2, FALCON_H1, GRANITE_MOE_HYBRID)
