"""Open a causal language model of transformers by its name."""

from pathlib import Path
from typing import Any

import torch

from zoo.language.bars import bars_for_large
from zoo.language.tokenizers import BYTES, FETCHED, Tokenizer, has_tokenizer
from zoo.language.tokens import check_features
from zoo.language.towers import (
    WANTED,
    create_language_model,
    is_language_model,
    released_weights,
    resembles_language_model,
    unknown_name,
    weights_folder,
)

RANDOM = "random"


def split_name(name: str) -> tuple[str, str]:
    """Split `NAME/WEIGHTS` of zoo's table, or a place with or without `/random`.

    Returns:
        The name in the table, or "" for a place of transformers; and the weights: a place,
        `random`, or "" for those that a name was released with.
    """
    place = name.removeprefix("lm:")
    first, _, rest = place.partition("/")
    if is_language_model(first) and not Path(place.removesuffix("/random")).exists():
        return first, rest
    return "", place


def open_language_model(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Any:
    """Return the plain object of transformers whose features can be read.

    Args:
        name: A folder with a `config.json`, a GGUF file, or a name on the Hub; `/random` at its end
            leaves the weights out. Or a name of zoo's table: `llama_tiny/random`, `llama/FOLDER`,
            `llama3_8b` for its released weights. `lm:` before it is allowed.
        device: On `meta` only shapes are known, and nothing is checked that needs weights.
        dtype: None for that of the file.

    Raises:
        ValueError: transformers is missing, there is no such model, it is no causal language
            model, or its logits are not its hidden states times its head.
    """
    is_meta = torch.device(device).type == "meta"
    base, weights = split_name(name)
    model = (
        _from_table(base, weights, is_meta, dtype) if base else _from_place(weights, is_meta, dtype)
    )
    model = model.to(device=device, dtype=dtype).eval()
    if not is_meta:
        check_features(model, name.removeprefix("lm:"))
    return model


def _from_table(base: str, weights: str, is_meta: bool, dtype: torch.dtype | None) -> Any:
    if is_meta and weights in ("", RANDOM):  # a released shape is known without its weights
        with torch.device("meta"):
            return create_language_model(base)
    if weights == RANDOM:
        return create_language_model(base)
    if is_meta:
        return _from_place(f"{weights}/{RANDOM}", is_meta, dtype)
    return create_language_model(base, pretrained=weights or True, dtype=dtype or "auto")


def _from_place(place: str, is_meta: bool, dtype: torch.dtype | None) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ValueError(
            "Language models need transformers: pip install 'backbone-zoo[llm]'."
        ) from error
    plain = place.removesuffix(f"/{RANDOM}")
    if resembles_language_model(plain) and "/" not in plain and not Path(plain).exists():
        raise unknown_name(plain)
    is_shape = plain != place or is_meta
    folder = weights_folder(plain, ("config.json",) if is_shape else WANTED)
    try:
        if is_shape:
            with torch.device("meta" if is_meta else "cpu"):
                return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        with bars_for_large(folder):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{plain} cannot be opened as a language model: {reason}") from error


def own_tokenizer(name: str) -> str:
    """Return what `open_tokenizer` opens for a language model's name: its folder, or `bytes`.

    Raises:
        ValueError: its repository on the Hub cannot be reached.
    """
    base, weights = split_name(name)
    if base:
        place = BYTES if weights == RANDOM else weights or released_weights(base)
    else:
        place = weights.removesuffix(f"/{RANDOM}")
    if place == BYTES:
        return BYTES
    folder = weights_folder(place, FETCHED)
    return str(folder) if has_tokenizer(folder) else BYTES


def check_length(model: Any, length: int, name: str, *, option: str = "--length") -> None:
    """Refuse rows that are longer than a model has positions.

    Args:
        option: What sets the length, for the message.

    Raises:
        ValueError: they are.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and length > positions:
        raise ValueError(
            f"Rows of {length:,} tokens are longer than the {positions:,} positions of {name}; "
            f"give {option} {positions} or less."
        )


def check_tokenizer(model: Any, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer with more tokens than a model has embeddings.

    Raises:
        ValueError: it has.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokenizer.size:
        raise ValueError(
            f"{name} has {rows:,} tokens and the tokenizer {tokenizer.size:,}; give --tokenizer "
            "with the folder of its own."
        )
