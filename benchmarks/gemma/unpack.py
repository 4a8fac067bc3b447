"""Join the parts of `pack`, and write a plain checkpoint in float32 and the texts' tokens.

python3 -m benchmarks.gemma.unpack parts/part* --out gemma

Needs gguf, for its arithmetic alone.
"""

import argparse
import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType  # pyright: ignore[reportMissingImports]
from gguf.quants import dequantize  # pyright: ignore[reportMissingImports]
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

PIECE = 4096
"""Rows that one thread makes at a time: an embedding has a quarter of a million."""


def floats(raw: bytes, kind: int, shape: list[int], pool: ThreadPoolExecutor) -> torch.Tensor:
    """Dequantise one tensor."""
    quantised = GGMLQuantizationType(kind)
    if quantised == GGMLQuantizationType.F32:
        return torch.from_numpy(np.frombuffer(raw, np.float32).reshape(shape).copy())
    rows = np.frombuffer(raw, np.uint8).reshape(shape)
    pieces = [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]
    made = pool.map(lambda piece: dequantize(piece, quantised), pieces)
    return torch.from_numpy(np.concatenate(list(made)).astype(np.float32, copy=False))


def unpack(content: bytes, out: Path) -> None:
    """Write `model/`, `train.npz`, `test.npz` and `about.json`."""
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as archive, ThreadPoolExecutor() as pool:
        about = json.loads(archive.read("about.json"))
        state = {
            name: floats(archive.read(f"tensors/{name}"), kind, shape, pool)
            for name, (kind, *shape) in about["tensors"].items()
        }
        # llama.cpp stores a norm's whole factor, transformers what is added to 1
        state |= {name: state[name] - 1 for name in state if name.endswith("norm.weight")}
        config = Gemma3TextConfig.from_dict(json.loads(archive.read("config.json")))
        for name in ("train", "test"):
            (out / f"{name}.npz").write_bytes(archive.read(f"{name}.npz"))
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(out / "model")
    special = {key: about[key] for key in ("bos", "eos")}
    (out / "about.json").write_text(json.dumps(special) + "\n")


def main() -> None:
    """Join and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    unpack(b"".join(part.read_bytes() for part in sorted(args.parts)), args.out)
    print(f"model and tokens  {args.out}")


if __name__ == "__main__":
    main()
