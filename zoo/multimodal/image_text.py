"""What a Llava takes, `ImageText`, and how its features are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from zoo.language.tokens import TokenFeatures, Tokens, head_of


@dataclass(frozen=True)
class ImageText:
    """Rows of tokens, some of which stand for the tokens of images.

    Images are in groups of one size each, so that those of several shapes fit one batch.
    """

    tokens: Tokens
    """One conversation a row; padding ends it."""
    answers: Bool[Tensor, "B T"]
    """Where the next token belongs to an answer: what is learnt, and what is measured."""
    images: Sequence[UInt8[Tensor, "n 3 H W"]] = ()
    """Bytes 0..255, at the size at which the tower takes them."""
    order: Sequence[Sequence[int]] = ()
    """Of each group, which images of the text they are, counted row by row."""

    @property
    def positions(self) -> Sequence[int]:
        return self.tokens.positions

    def to(self, device, *, non_blocking: bool = True) -> "ImageText":
        """Move the tensors to `device`."""
        images = [group.to(device, non_blocking=non_blocking) for group in self.images]
        answers = self.answers.to(device, non_blocking=non_blocking)
        return ImageText(self.tokens.to(device), answers, images, self.order)


def image_tokens(model: Any, batch: ImageText) -> Float[Tensor, "n D"]:
    """Return the projected tokens of all images of a batch, in the order of the text."""
    inner, found = model.model, dict[int, Tensor]()
    for group, places in zip(batch.images, batch.order, strict=True):
        pixels = group.float() / 255
        projected = inner.multi_modal_projector(inner.vision_tower(pixels).last_hidden_state)
        found |= dict(zip(places, projected, strict=True))
    return torch.cat([found[place] for place in sorted(found)])


def read_image_text(model: Any, batch: ImageText, *, at: Sequence[float] = ()) -> TokenFeatures:
    """Read a Llava's features of a batch, as `zoo.language.tokens.read_tokens` reads a tower's.

    It is what `LlavaForConditionalGeneration.forward` computes, for images of several sizes too.

    Args:
        at: As for `read_tokens`: layers of the language model, as shares of its depth.

    Raises:
        ValueError: there are more or fewer tokens for images in the text than the images make.
    """
    ids, inner = batch.tokens.ids, model.model
    embeds = inner.get_input_embeddings()(ids)
    if batch.images:
        tokens = image_tokens(model, batch).to(embeds.dtype)
        places = ids == model.config.image_token_id
        check_places(places, len(tokens))
        embeds = embeds.masked_scatter(places[..., None], tokens)
    out = inner.language_model(inputs_embeds=embeds, output_hidden_states=bool(at), use_cache=False)
    states = [out.hidden_states[round(share * (len(out.hidden_states) - 1))] for share in at]
    return TokenFeatures(out.last_hidden_state, head_of(model), tuple(states))


def check_places(places: Int[Tensor, "B T"] | Bool[Tensor, "B T"], tokens: int) -> None:
    """Refuse a text whose tokens for images are not as many as the images make.

    On a GPU this is left to what builds batches: it would wait for the device at every step.

    Raises:
        ValueError: the numbers differ.
    """
    if places.is_cuda:
        return
    wanted = int(places.sum())
    if wanted != tokens:
        raise ValueError(
            f"The text has {wanted} tokens for images and the images make {tokens}; give each "
            "image as many as its grid has cells."
        )
