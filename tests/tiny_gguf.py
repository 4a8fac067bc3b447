"""Write a tiny Gemma 3 in GGUF, with a tokenizer of letters."""

from pathlib import Path

import gguf
import numpy as np

WIDTH, FFN, HEADS, HEAD = 32, 192, 2, 32
LETTERS = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\n"]
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
TYPES = [3] * 4 + [6] * 256 + [1] * len(LETTERS)


def write(path: Path, layers: int = 4) -> None:
    """Write it with matrices of 8 bits, as llama.cpp names and stacks them."""
    out = gguf.GGUFWriter(str(path), "gemma3")
    out.add_name("tiny")
    out.add_context_length(64)
    out.add_embedding_length(WIDTH)
    out.add_block_count(layers)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(1)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(1e6)
    out.add_sliding_window(16)
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    out.add_token_list(WORDS)
    out.add_token_scores([-1000.0] * 260 + [-float(i) for i in range(len(LETTERS))])
    out.add_token_types(TYPES)
    out.add_bos_token_id(2)
    out.add_eos_token_id(1)
    out.add_unk_token_id(3)
    out.add_pad_token_id(0)
    draws = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draws.normal(size=(rows, columns)).astype(np.float32) / columns**0.5
        kind = gguf.GGMLQuantizationType.Q8_0
        out.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str, width: int) -> None:
        values = 1 + 0.1 * draws.normal(size=width).astype(np.float32)
        out.add_tensor(f"{name}.weight", values)

    matrix("token_embd", len(WORDS), WIDTH)
    norm("output_norm", WIDTH)
    for i in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"blk.{i}.{name}", WIDTH)
        for name in ("attn_q_norm", "attn_k_norm"):
            norm(f"blk.{i}.{name}", HEAD)
        matrix(f"blk.{i}.attn_q", HEADS * HEAD, WIDTH)
        matrix(f"blk.{i}.attn_k", HEAD, WIDTH)
        matrix(f"blk.{i}.attn_v", HEAD, WIDTH)
        matrix(f"blk.{i}.attn_output", WIDTH, HEADS * HEAD)
        matrix(f"blk.{i}.ffn_gate", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_up", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_down", WIDTH, FFN)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
