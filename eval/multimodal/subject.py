"""The model of images and text under test."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from zoo.data.conversations import Conversations
from zoo.data.image_text import ImageTextSource
from zoo.eval.language.subject import LanguageSubject
from zoo.language.tokenizers import BYTES, has_tokenizer, open_tokenizer
from zoo.multimodal.open import VLM, open_vlm, parts_of, pixels_of, tower_of, vlm_folder


@dataclass(kw_only=True)
class ImageTextSubject(LanguageSubject):
    """transformers' Llava with a tower of zoo's."""

    def source(self, conversations: Conversations) -> ImageTextSource:
        """Return conversations as this model sees them, one question each."""
        positions = getattr(self.model.config.text_config, "max_position_embeddings", None)
        return ImageTextSource(
            conversations.turn_by_turn(),
            self.tokenizer,
            self.model.config.image_token_id,
            pixels_of(self.model),
            positions or 2**20,
        )


def is_image_text(target: str | None) -> bool:
    """Tell whether a target names a model of images and text: `vlm:`, or a folder with a Llava."""
    if target is None:
        return False
    if target.startswith(VLM):
        return True
    try:
        vlm_folder(target)
    except (ValueError, OSError):
        return False
    return True


def open_image_text_subject(
    target: str | None,
    *,
    tokenizer: str = "",
    device: torch.device,
    precision: Literal["float32", "amp"],
    batch: int,
    seed: int,
) -> ImageTextSubject:
    """Open a model of images and text to be measured: a run, or a folder of transformers.

    Args:
        tokenizer: What `open_tokenizer` takes; the folder's own by default, else bytes.

    Raises:
        ValueError: there is no target, or no such model.
    """
    if target is None:
        raise ValueError("Name what to measure: vlm:RUN or vlm:FOLDER.")
    folder = vlm_folder(target)
    opened = open_tokenizer(tokenizer or (str(folder) if has_tokenizer(folder) else BYTES))
    return ImageTextSubject(
        name=target, model=open_vlm(target, device=device), tokenizer=opened, device=device,
        precision=precision, batch=batch, seed=seed,
    )  # fmt: skip


def about_image_text_model(subject: ImageTextSubject) -> dict[str, Any]:
    """Return name, parameters of each part, tokens an image and tokenizer, for a record."""
    model = subject.model
    return dict(
        name=type(tower_of(model)).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        parts={n: sum(p.numel() for p in part.parameters()) for n, part in parts_of(model).items()},
        image_tokens=model.config.image_seq_length,
        tokenizer=subject.tokenizer.digest,
    )
