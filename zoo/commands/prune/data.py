"""The samples that `zoo prune` looks at, as a model takes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor

from zoo.commands.prune.image_text import Samples, read_image_text, takes_both
from zoo.commands.prune.request import HELD
from zoo.data.embedded import EMBEDDED
from zoo.data.sources import open_source
from zoo.data.text import open_text
from zoo.data.views import View
from zoo.language.open import check_length
from zoo.language.tokenizers import has_tokenizer, open_tokenizer
from zoo.students.prune.library import Parent


def read_samples(parent: Parent, path: Path, *, number: int, length: int, seed: int) -> Samples:
    """Read images, rows of text, or questions about images.

    Raises:
        ValueError: there is less than asked for, or the model takes something else.
    """
    if takes_both(parent):
        return read_image_text(parent, path, number=number, length=length, seed=seed)
    model: Any = parent.model
    key = "x" if parent.name else model.main_input_name
    if key == "input_ids":
        return {key: _rows(parent, path, number, length, seed)}
    if key in ("x", "pixel_values"):
        return {key: _images(parent, path, number, seed)}
    raise ValueError(f"{type(model).__name__} takes {key}; give --score magnitude instead of data.")


def batches_of(samples: Samples, size: int, device: torch.device) -> Iterator[Samples]:
    """Cut samples into batches on a device."""
    for i in range(0, len(next(iter(samples.values()), ())), size):
        yield {key: value[i : i + size].to(device) for key, value in samples.items()}


def split(samples: Samples, share: float) -> tuple[Samples, Samples]:
    """Keep the last samples apart, as many as a comparison takes at least."""
    total = len(next(iter(samples.values())))
    first = total - max(HELD, round(share * total))
    return {k: v[:first] for k, v in samples.items()}, {k: v[first:] for k, v in samples.items()}


def _choose(there: int, number: int, what: str, path: Path, seed: int) -> np.ndarray:
    if there < number:
        raise ValueError(
            f"{path} has {there} {what}, not the {number} asked for: --samples {there}."
        )
    return np.random.default_rng(seed).permutation(there)[:number]


def _rows(parent: Parent, path: Path, number: int, length: int, seed: int) -> Tensor:
    model: Any = parent.model
    own = has_tokenizer(parent.folder) if parent.folder else False
    tokenizer = open_tokenizer(str(parent.folder) if own else "bytes")
    if not own and model.get_input_embeddings().weight.shape[0] != tokenizer.size:
        raise ValueError(
            f"There is no tokenizer in {parent.folder}, and its vocabulary is not that of bytes."
        )
    check_length(model, length, str(parent.folder or type(model).__name__))
    source = open_text(path, tokenizer, length)
    chosen = _choose(len(source), number, f"rows of {length} tokens", path, seed)
    return source.rows(chosen).ids


def _images(parent: Parent, path: Path, number: int, seed: int) -> Tensor:
    if str(path) in EMBEDDED:
        path = EMBEDDED[str(path)]()
    source = open_source(path)
    model: Any = parent.model
    if parent.name:
        config = timm.data.resolve_model_data_config(model)
        side, mean, std = config["input_size"][-1], config["mean"], config["std"]
        embed = getattr(model, "patch_embed", None)
        side = getattr(embed, "img_size", None) or (side, side)
    else:
        side, mean, std = (model.config.image_size,) * 2, (0.5,) * 3, (0.5,) * 3
    view = View(size=side[0])
    chosen = _choose(len(source), number, "images", path, seed)
    pixels = torch.from_numpy(np.stack([view.evaluate(source.read(int(i))) for i in chosen]))
    shape = (1, 3, 1, 1)
    return (pixels / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
