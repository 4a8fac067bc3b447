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


def see_images(model: Any, batch: ImageText) -> list[Float[Tensor, "n N C"]]:
    """Return the tower's tokens of each group of images."""
    tower = model.model.vision_tower
    return [tower(group.float() / 255).last_hidden_state for group in batch.images]


def image_tokens(
    model: Any, batch: ImageText, seen: Sequence[Tensor] | None = None
) -> Float[Tensor, "n D"]:
    """Return the projected tokens of all images of a batch, in the order of the text.

    Args:
        seen: What `see_images` has returned, where it is known already.
    """
    project, found = model.model.multi_modal_projector, dict[int, Tensor]()
    seen = see_images(model, batch) if seen is None else seen
    if len(seen) == 1:  # all images have one size
        return project(seen[0]).flatten(0, 1)
    for group, places in zip(seen, batch.order, strict=True):
        found |= dict(zip(places, project(group), strict=True))
    return torch.cat([found[place] for place in sorted(found)])


def read_image_text(
    model: Any,
    batch: ImageText,
    *,
    at: Sequence[float] = (),
    seen: Sequence[Tensor] | None = None,
) -> TokenFeatures:
    """Read a Llava's features of a batch, as `zoo.language.tokens.read_tokens` reads a tower's.

    It is what `LlavaForConditionalGeneration.forward` computes, for images of several sizes too.

    Args:
        at: As for `read_tokens`: layers of the language model, as shares of its depth.
        seen: As for `image_tokens`.

    Raises:
        ValueError: there are more or fewer tokens for images in the text than the images make.
    """
    ids, inner = batch.tokens.ids, model.model
    embeds = inner.get_input_embeddings()(ids)
    if batch.images:
        tokens = image_tokens(model, batch, seen).to(embeds.dtype)
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
