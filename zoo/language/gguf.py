"""GGUF, llama.cpp's file of quantised weights: read once as float, and kept as a plain folder."""

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from zoo.files import cache_dir


def find_gguf(name: str | Path) -> Path | None:
    """Return the GGUF file that a name stands for: itself, or the only one in a folder of no other
    form.

    Raises:
        ValueError: a folder holds several.
    """
    place = Path(name)
    if place.suffix == ".gguf":
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    found = sorted(place.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{place} holds {len(found)} GGUF files ({names}); name one of them.")
    return found[0] if found else None


def dequantised(file: Path) -> Path:
    """Return a folder of transformers with the weights of a GGUF file in float32.

    Its tokenizer, if it has one, lies beside them. transformers cannot write what it read from
    GGUF, so the weights go into a fresh model of the same config. That takes minutes on a busy
    machine and is kept in the cache.

    Raises:
        ValueError: there is no such file, a package is missing, or transformers cannot read it.
    """
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    if missing := [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]:
        raise ValueError(f"Reading {file.name} needs {' and '.join(missing)}: pip install them.")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    place = cache_dir() / "gguf" / digest[:24]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            _write(file, making)
            making.rename(place)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return place


def begins(file: Path) -> bool:
    """Tell whether texts begin with a token of their own: said by the file, else by its kind of
    tokenizer, as llama.cpp has it (yes for SentencePiece, which it calls llama)."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    fields = GGUFReader(file).fields
    if (said := fields.get("tokenizer.ggml.add_bos_token")) is not None:
        return bool(said.contents())
    kind = fields.get("tokenizer.ggml.model")
    return kind is not None and kind.contents() == "llama"


def _write(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = dict(gguf_file=file.name)
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read by transformers: {error}") from error
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    if begins(file) and not tokenizer.add_bos_token:  # transformers 5.17 forgets it
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    tokenizer.save_pretrained(folder)
