"""Pack Gemma 3 from a GGUF file, with tokenised texts, into parts for a machine without a network.

python3 -m benchmarks.gemma.pack gemma.gguf --train valid.txt --test test.txt --out parts --parts 4

The weights stay quantised, under transformers' names; `unpack` makes a plain checkpoint of them in
seconds. Needs gguf, accelerate and transformers. Nothing of it may be committed: Gemma's terms.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer

from zoo.language.gguf import dequantised

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of the tensors of a Gemma 3 block, and transformers'."""
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def renamed(name: str) -> str:
    """Return transformers' name of a tensor."""
    words = name.split(".")
    if words[0] == "blk":
        return f"model.layers.{words[1]}.{BLOCK[words[2]]}.{words[3]}"
    return f"{WHOLE[words[0]]}.{words[1]}"


def tokens_of(text: Path, tokenizer: Any) -> dict[str, Any]:
    """Tokenise one text, without special tokens."""
    content = text.read_text(encoding="utf-8")
    ids = tokenizer.encode(content, add_special_tokens=False, verbose=False)
    size = len(content.encode()) / len(ids)
    return dict(ids=np.array(ids, np.int32), bytes_a_token=np.array(size))


def pack(file: Path, texts: dict[str, Path]) -> bytes:
    """Return one archive with everything."""
    folder = dequantised(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", (folder / "config.json").read_text())
        kinds = {}
        for tensor in GGUFReader(file).tensors:
            name = renamed(tensor.name)
            kinds[name] = (int(tensor.tensor_type), *map(int, tensor.data.shape))
            archive.writestr(f"tensors/{name}", tensor.data.tobytes())
        about = dict(tensors=kinds, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id)
        archive.writestr("about.json", json.dumps(about))
        for name, text in texts.items():
            array = io.BytesIO()
            np.savez(array, **tokens_of(text, tokenizer))
            archive.writestr(f"{name}.npz", array.getvalue())
    return content.getvalue()


def main() -> None:
    """Write `part0`, `part1`, ..."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="text that scores may see")
    parser.add_argument("--test", type=Path, required=True, help="text for the last figures")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    content = pack(args.gguf, dict(train=args.train, test=args.test))
    args.out.mkdir(parents=True, exist_ok=True)
    size = -(-len(content) // args.parts)
    for i in range(args.parts):
        part = args.out / f"part{i}"
        part.write_bytes(content[i * size : (i + 1) * size])
        print(f"{part}  {part.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
