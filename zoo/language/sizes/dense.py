"""Decoders whose layers are all attention and an MLP: Llama, Qwen3, Gemma 3, Nemotron."""

from typing import Any

from zoo.language.sizes.family import BYTES, Family, Fields, Size, attention, gated

SMALL = dict[str, Any](max_position_embeddings=2048, **BYTES)
TINY = dict[str, Any](num_hidden_layers=2, max_position_embeddings=512, **BYTES)


def _theta(theta: float, **scaling: Any) -> dict[str, Any]:
    kind = "llama3" if scaling else "default"
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **scaling))


# ---------------------------------------------------------------- Llama (2302.13971, 2407.21783)


def _llama(dim: int) -> dict[str, Any]:
    return dict(hidden_size=dim, intermediate_size=gated(dim), **attention(dim))


def _llama3(dim: int, ffn: int, depth: int, heads: int, kv: int = 8, **fields: Any) -> Fields:
    return dict(
        vocab_size=128256, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=kv, rms_norm_eps=1e-5, bos_token_id=128000,
        eos_token_id=128001, **fields,
    )  # fmt: skip


def _stretched(factor: float) -> dict[str, Any]:
    """Positions stretched from the 8,192 of Llama 3."""
    return dict(
        max_position_embeddings=131072,
        **_theta(
            5e5, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )  # fmt: skip


LLAMA = Family(
    name="llama",
    config="LlamaConfig",
    widths=_llama,
    tiny=Size(41_184, _llama(32) | TINY),
    laptop=Size(6_034_176, _llama(256) | SMALL | dict(num_hidden_layers=8)),
    sizes=dict(
        llama2_7b=Size(
            6_738_415_616,
            dict(num_hidden_layers=32, max_position_embeddings=4096, rms_norm_eps=1e-5),
            "meta-llama/Llama-2-7b-hf",
            "llama2",
        ),
        llama3_8b=Size(
            8_030_261_248,
            _llama3(4096, 14336, 32, 32, max_position_embeddings=8192, **_theta(5e5)),
            "meta-llama/Meta-Llama-3-8B",
            "llama3",
        ),
        llama3_70b=Size(
            70_553_706_496,
            _llama3(8192, 28672, 80, 64, max_position_embeddings=8192, **_theta(5e5)),
            "meta-llama/Meta-Llama-3-70B",
            "llama3",
        ),
        llama3_1_8b=Size(
            8_030_261_248,
            _llama3(4096, 14336, 32, 32, **_stretched(8.0)),
            "meta-llama/Llama-3.1-8B",
            "llama3.1",
        ),
        llama3_2_1b=Size(
            1_235_814_400,
            _llama3(2048, 8192, 16, 32, tie_word_embeddings=True, **_stretched(32.0)),
            "meta-llama/Llama-3.2-1B",
            "llama3.2",
        ),
        llama3_2_3b=Size(
            3_212_749_824,
            _llama3(3072, 8192, 28, 24, tie_word_embeddings=True, **_stretched(32.0)),
            "meta-llama/Llama-3.2-3B",
            "llama3.2",
        ),
    ),
)

# ---------------------------------------------------------------- Qwen3 (2505.09388)


def _qwen3(dim: int, ffn: int, depth: int, heads: int, **fields: Any) -> Fields:
    return dict(
        hidden_size=dim, intermediate_size=ffn, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=8, max_position_embeddings=40960, bos_token_id=151643,
        eos_token_id=151645, **_theta(1e6), **fields,
    )  # fmt: skip


def _released(parameters: int, name: str, fields: Fields) -> Size:
    return Size(parameters, fields, f"Qwen/{name}", "apache-2.0")


TIED = dict(tie_word_embeddings=True)
QWEN3 = Family(
    name="qwen3",
    config="Qwen3Config",
    widths=_llama,
    tiny=Size(41_216, _llama(32) | TINY),
    laptop=Size(6_035_200, _llama(256) | SMALL | dict(num_hidden_layers=8)),
    sizes=dict(
        qwen3_0_6b=_released(596_049_920, "Qwen3-0.6B", _qwen3(1024, 3072, 28, 16, **TIED)),
        qwen3_1_7b=_released(1_720_574_976, "Qwen3-1.7B", _qwen3(2048, 6144, 28, 16, **TIED)),
        qwen3_4b=_released(4_022_468_096, "Qwen3-4B", _qwen3(2560, 9728, 36, 32, **TIED)),
        qwen3_8b=_released(8_190_735_360, "Qwen3-8B", _qwen3(4096, 12288, 36, 32)),
        qwen3_14b=_released(14_768_307_200, "Qwen3-14B", _qwen3(5120, 17408, 40, 40)),
        qwen3_32b=_released(32_762_123_264, "Qwen3-32B", _qwen3(5120, 25600, 64, 64)),
    ),
)

# ---------------------------------------------------------------- Gemma 3 (2503.19786)


def _gemma3(dim: int) -> dict[str, Any]:
    heads = attention(dim)
    return dict(
        hidden_size=dim, intermediate_size=gated(dim), **heads,
        query_pre_attn_scalar=heads["head_dim"],
    )  # fmt: skip


def _gemma3_text(
    dim: int, ffn: int, depth: int, heads: int, kv: int, window: int, context: int, **fields: Any
) -> Fields:
    return dict(
        hidden_size=dim, intermediate_size=ffn, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv, sliding_window=window, max_position_embeddings=context, **fields,
    )  # fmt: skip


SMALL_VOCABULARY = dict(vocab_size=262144)
GEMMA3 = Family(
    name="gemma3",
    config="Gemma3TextConfig",
    widths=_gemma3,
    # a layer of each kind: a window, and the whole text
    tiny=Size(
        33_120,
        _gemma3(32)
        | TINY
        | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    laptop=Size(8_927_232, _gemma3(256) | SMALL | dict(num_hidden_layers=12, sliding_window=512)),
    sizes=dict(
        gemma3_270m=Size(
            268_098_176,
            _gemma3_text(640, 2048, 18, 4, 1, 512, 32768, **SMALL_VOCABULARY),
            "google/gemma-3-270m",
            "gemma",
        ),
        gemma3_1b=Size(
            999_885_952,
            _gemma3_text(1152, 6912, 26, 4, 1, 512, 32768, **SMALL_VOCABULARY),
            "google/gemma-3-1b-pt",
            "gemma",
        ),
        # Released with a vision tower: AutoModelForCausalLM reads another class from those files.
        gemma3_4b=Size(
            3_880_263_168, _gemma3_text(2560, 10240, 34, 8, 4, 1024, 131072), "", "gemma"
        ),
        gemma3_12b=Size(
            11_766_034_176, _gemma3_text(3840, 15360, 48, 16, 8, 1024, 131072), "", "gemma"
        ),
        gemma3_27b=Size(
            27_009_346_304,
            _gemma3_text(
                5376, 21504, 62, 32, 16, 1024, 131072, head_dim=128, query_pre_attn_scalar=168
            ),
            "",
            "gemma",
        ),
    ),
)

# ------------------------ Nemotron-4 (2402.16819, 2406.11704) and Minitron (2407.14679)


def _nemotron(dim: int) -> dict[str, Any]:
    return dict(hidden_size=dim, intermediate_size=4 * dim, **attention(dim))


def _nemotron4(dim: int, ffn: int, depth: int, heads: int, **fields: Any) -> Fields:
    # transformers' default leaves out the groups of keys and values, and then builds no model
    return dict(
        vocab_size=256000, hidden_size=dim, intermediate_size=ffn, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=8, max_position_embeddings=4096, **fields,
    )  # fmt: skip


OPEN = "nvidia-open-model-license"
NEMOTRON = Family(
    name="nemotron",
    config="NemotronConfig",
    widths=_nemotron,
    tiny=Size(39_296, _nemotron(32) | TINY),
    laptop=Size(5_907_456, _nemotron(256) | SMALL | dict(num_hidden_layers=8)),
    sizes=dict(
        nemotron4_15b=Size(15_628_775_424, _nemotron4(6144, 24576, 32, 48)),
        # Released in NeMo's form alone.
        nemotron4_340b=Size(341_029_195_776, _nemotron4(18432, 73728, 96, 96), "", OPEN),
        minitron_8b=Size(
            8_271_699_968,
            _nemotron4(4096, 16384, 32, 48, head_dim=128),
            "nvidia/Minitron-8B-Base",
            OPEN,
        ),
        minitron_4b=Size(
            4_190_509_056,
            _nemotron4(3072, 9216, 32, 24, head_dim=128),
            "nvidia/Minitron-4B-Base",
            OPEN,
        ),
    ),
)

DENSE = (LLAMA, QWEN3, GEMMA3, NEMOTRON)
