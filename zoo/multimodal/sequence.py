"""A Llava over several ranks that hold a row together: long videos, many images.

Two steps (LongVILA, 2408.10188): images are shared out evenly for the tower, and what it makes of
them is gathered; then tokens, of text and images together, are shared out evenly for the language
model, whose attention goes over heads (Ulysses). Frames of a video are images.

Nothing is padded: one uneven exchange brings every rank the projected tokens, of which it takes
those of its stretch.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.language.token_parallel import TokenParallel
from zoo.language.tokens import TokenFeatures, head_of
from zoo.layers.sequence import Group, even_lengths, gather_tokens, split_tokens, world
from zoo.multimodal.budget import tokens_of
from zoo.multimodal.image_text import ImageText, check_places


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Share images out so that the costliest share is small: longest first, to whom has least.

    It is at most 4/3 - 1/(3 ranks) of the best (Graham 1969). A share keeps the images' order.

    Args:
        costs: Tokens of each image.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for image in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(image)
        heapq.heappush(loads, (load + costs[image], rank))
    return [sorted(share) for share in shares]


class ImageTextParallel:
    """A Llava whose rows are spread over ranks; its language model is changed in place.

    Each rank takes the loss of its own tokens; gradients of weights are to be added up over the
    ranks (`zoo.language.token_parallel.add_over_ranks`).

    Args:
        model: transformers' Llava with a tower of zoo's.
        group: The ranks that hold a row together.

    Raises:
        ValueError: the language model cannot be spread, or its heads do not split.
    """

    def __init__(self, model: Any, group: Group):
        self.model, self.group = model, group
        self.tokens = TokenParallel(model.model.language_model, group)

    def read(self, batch: ImageText, lengths: Sequence[int] | None = None) -> TokenFeatures:
        """Read the features of this rank's stretch of rows that all ranks have.

        Args:
            lengths: Tokens of each rank; as even as can be by default.

        Raises:
            ValueError: lengths do not add up, or the text's tokens for images are not as many as
                the images make.
        """
        inner, ids = self.model.model, batch.tokens.ids
        lengths = lengths or even_lengths(ids.shape[1], self.group)
        places = ids == self.model.config.image_token_id
        seen = self.image_tokens(batch)
        check_places(places, len(seen))
        # numbers of the images' tokens at their places, so that a stretch finds its own
        numbers = (places.flatten().long().cumsum(0) - 1).view_as(ids)
        mine, here = (split_tokens(x, lengths, self.group) for x in (places, numbers))
        embeds = inner.get_input_embeddings()(split_tokens(ids, lengths, self.group))
        embeds = embeds.masked_scatter(mine[..., None], seen[here[mine]].to(embeds.dtype))
        out = self.tokens.run(batch.tokens, lengths, inputs_embeds=embeds)
        return TokenFeatures(out.last_hidden_state, head_of(self.model), ())

    def image_tokens(self, batch: ImageText) -> Float[Tensor, "n D"]:
        """Return the projected tokens of all images, in the order of the text, on every rank."""
        inner = self.model.model
        images = {
            place: image
            for group, order in zip(batch.images, batch.order, strict=True)
            for image, place in zip(group, order, strict=True)
        }
        cell = inner.vision_tower.config.patch_size
        sides = [images[i].shape[-2:] for i in range(len(images))]
        counts = [tokens_of(height, width, cell) for height, width in sides]
        shares = share_out(counts, world(self.group))
        own = shares[torch.distributed.get_rank(self.group) if self.group is not None else 0]
        made = dict[int, Tensor]()
        for size in dict.fromkeys(images[i].shape for i in own):
            alike = [i for i in own if images[i].shape == size]
            pixels = torch.stack([images[i] for i in alike]).float() / 255
            tokens = inner.multi_modal_projector(inner.vision_tower(pixels).last_hidden_state)
            made |= dict(zip(alike, tokens, strict=True))
        # a rank without images has no tokens, through which gradients flow all the same
        nothing = inner.multi_modal_projector.linear_2.weight[:0]
        mine = torch.cat([nothing, *(made[i] for i in own)])
        lengths = [sum(counts[i] for i in share) for share in shares]
        gathered = gather_tokens(mine[None], lengths, self.group)[0]
        order = [i for share in shares for i in share]
        found = dict(zip(order, gathered.split([counts[i] for i in order]), strict=True))
        return torch.cat([found[i] for i in range(len(counts))])
