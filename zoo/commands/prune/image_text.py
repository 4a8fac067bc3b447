"""What `zoo prune` looks at of a model of images and text."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data.conversations import open_conversations
from zoo.data.image_text import ImageTextSource
from zoo.language.tokenizers import BYTES, has_tokenizer, open_tokenizer
from zoo.multimodal.open import pixels_of
from zoo.students.prune.library import Parent, towers_of

Samples = dict[str, torch.Tensor]
"""The arguments of a forward pass for all samples, one sample a row."""
TEXT = 32
"""Tokens behind those of the image, in the costs of a model without data."""


def takes_both(parent: Parent) -> bool:
    """Tell whether a parent is a Llava with a tower of zoo's."""
    return not parent.name and bool(towers_of(parent.model))


def check_form(parent: Parent, form: str) -> None:
    """Refuse what cannot be written of a model of images and text.

    Raises:
        ValueError: it is to be cut to zoo's own form.
    """
    if takes_both(parent) and form != "library":
        raise ValueError(
            "A model of images and text is cut to what transformers and timm can build: leave out "
            f"--form {form}."
        )


def read_image_text(parent: Parent, data: Path, *, number: int, length: int, seed: int) -> Samples:
    """Read questions about images with their answers, one image each and all of one size.

    Returns:
        `input_ids` and `attention_mask` [n T], padded behind the end, and `pixel_values`.

    Raises:
        ValueError: there are fewer than asked for.
    """
    model: Any = parent.model
    own = parent.folder is not None and has_tokenizer(parent.folder)
    tokenizer = open_tokenizer(str(parent.folder) if own else BYTES)
    train, _ = open_conversations(str(data), 0.05)
    source = ImageTextSource(
        train, tokenizer, model.config.image_token_id, pixels_of(model), length
    )
    chosen: list[int] = []
    sizes: list[tuple[int, int]] = []
    for index in np.random.default_rng(seed).permutation(len(source)):
        found = source.encoded(int(index)).sizes
        if len(found) == 1:
            chosen.append(int(index))
            sizes.append(found[0])
        if sizes and max(Counter(sizes).values()) == number:
            break
    (size, there), *_ = Counter(sizes).most_common(1) or [((0, 0), 0)]
    if there < number:
        raise ValueError(
            f"{data} has {there} questions about one image of one size, not the {number} asked "
            f"for: --samples {there}."
        )
    rows = source.rows([i for i, s in zip(chosen, sizes, strict=True) if s == size])
    (images,) = rows.images
    mask = (rows.tokens.segments >= 0).long()
    return dict(input_ids=rows.tokens.ids, attention_mask=mask, pixel_values=images.float() / 255)


def one_sample(parent: Parent, samples: Samples | None) -> Samples:
    """Return an image with a text of median length, which costs are those of."""
    if samples is None:
        config: Any = getattr(parent.model, "config", None)
        tower = pixels_of(parent.model)
        ids = torch.full((1, config.image_seq_length + TEXT), config.image_token_id)
        ids[:, config.image_seq_length :] = 0
        pixels = torch.zeros(1, 3, *tower.fitted(tower.size, tower.size))
        return dict(input_ids=ids, pixel_values=pixels)
    lengths = samples["attention_mask"].sum(1)
    middle = int(lengths.argsort()[len(lengths) // 2])
    ids = samples["input_ids"][middle : middle + 1, : int(lengths[middle])]
    return dict(input_ids=ids, pixel_values=samples["pixel_values"][middle : middle + 1])
