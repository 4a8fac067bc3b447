"""Open a causal language model of transformers by its name."""

from pathlib import Path
from typing import Any

import torch

from zoo.language.gguf import dequantised, find_gguf
from zoo.language.tokens import check_features


def open_language_model(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Any:
    """Return the plain object of transformers whose features can be read.

    Args:
        name: A folder with a `config.json`, a GGUF file, or a name on the Hub; `/random` at its end
            leaves the weights out. `lm:` before it is allowed.
        device: On `meta` only shapes are known, and nothing is checked that needs weights.
        dtype: None for that of the file.

    Raises:
        ValueError: transformers is missing, there is no such model, it is no causal language
            model, or its logits are not its hidden states times its head.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ValueError(
            "Language models need transformers: pip install 'backbone-zoo[llm]'."
        ) from error
    place = name.removeprefix("lm:").removesuffix("/random")
    if file := find_gguf(place):
        place = str(dequantised(file))
    if place.startswith((".", "/", "~")) and not (Path(place) / "config.json").is_file():
        raise ValueError(f"There is no language model in {place}: config.json is missing.")
    model: Any
    is_meta = torch.device(device).type == "meta"
    try:
        if name.endswith("/random") or is_meta:
            with torch.device(device if is_meta else "cpu"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
        else:
            model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{place} cannot be opened as a language model: {reason}") from error
    model = model.to(device=device, dtype=dtype).eval()
    if not is_meta:
        check_features(model, place)
    return model
