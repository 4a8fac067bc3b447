"""What language towers take, `Tokens`, and what they return, `TokenFeatures`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPREAD = "zoo_spread"
"""What a model whose rows lie over ranks is read through, among its attributes."""
ALL = slice(None)


class TokenFeatures(NamedTuple):
    """A tower's answer to a batch: never its logits, which are 4 GB for 8,192 tokens."""

    last: Float[Tensor, "B T D"]
    """The hidden states after the final norm; the logits are `last @ head.T`."""
    head: Float[Tensor, "V D"]
    """The output embedding."""
    hidden: tuple[Float[Tensor, "B T D"], ...] = ()
    """The states after those layers that were asked for."""


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids; a row may hold several documents, none of which sees another."""

    ids: Int[Tensor, "B T"]
    segments: Int[Tensor, "B T"]
    """Number of the document in its row, rising from 0; -1 for padding, which ends a row."""
    keys: Sequence[str] = ()
    """Names of the rows, for error messages."""
    positions: Sequence[int] = ()
    """Positions in the stream of training rows."""
    own: slice = field(default_factory=lambda: ALL)
    """The columns that this rank learns from; the others are here so that it knows what follows."""

    @property
    def counted(self) -> Bool[Tensor, "B t"]:
        """Where the next token is one of the same document, so that it can be learnt."""
        follows = (self.segments[:, 1:] == self.segments[:, :-1]) & (self.segments[:, 1:] >= 0)
        return torch.nn.functional.pad(follows, (0, 1))[:, self.own]

    @property
    def following(self) -> Int[Tensor, "B t"]:
        """The token after each; anything where `counted` is false."""
        return self.ids.roll(-1, dims=1)[:, self.own]

    @property
    def places(self) -> Int[Tensor, "B T"]:
        """Each token's place in its document, from 0: transformers separates documents by them."""
        steps = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        begins = self.segments.diff(dim=1, prepend=self.segments[:, :1] - 1) != 0
        return steps - torch.where(begins, steps, 0).cummax(dim=1).values

    def to(self, device, *, non_blocking: bool = True) -> "Tokens":
        """Move the tensors to `device`."""
        ids, segments = (x.to(device, non_blocking=non_blocking) for x in (self.ids, self.segments))
        return replace(self, ids=ids, segments=segments)


def read_tokens(model: Any, tokens: Tokens, *, at: Sequence[float] = ()) -> TokenFeatures:
    """Read the features of any causal language model of transformers, those of `tokens.own`.

    Args:
        at: Layers whose states are wanted too, as shares of the depth: 0 for the embeddings, 1 for
            the last, which is after the final norm.
    """
    if (spread := getattr(model, SPREAD, None)) is not None:
        return spread.read(tokens, at=at)
    tower, options = model.base_model, dict[str, Any](use_cache=False)
    if "position_ids" in inspect.signature(tower.forward).parameters:
        options["position_ids"] = tokens.places
    out = tower(input_ids=tokens.ids, output_hidden_states=bool(at), **options)
    states = states_at(out, at)
    if tokens.own != ALL:
        states = tuple(state[:, tokens.own] for state in states)
        return TokenFeatures(out.last_hidden_state[:, tokens.own], head_of(model), states)
    return TokenFeatures(out.last_hidden_state, head_of(model), states)


def states_at(out: Any, at: Sequence[float]) -> tuple[Float[Tensor, "B T D"], ...]:
    """Return the hidden states of a tower's answer at shares of its depth."""
    return tuple(out.hidden_states[round(share * (len(out.hidden_states) - 1))] for share in at)


def head_of(model: Any) -> Float[Tensor, "V D"]:
    """Return the matrix that hidden states times make the logits.

    Falcon-H1 multiplies its logits by a constant and Granite divides them by one: here the head is.
    """
    weight, config = model.get_output_embeddings().weight, model.config
    times, over = (getattr(config, key, 1.0) for key in ("lm_head_multiplier", "logits_scaling"))
    scale = (1.0 if times is None else times) / (over or 1.0)
    return weight if scale == 1 else weight * scale


@torch.no_grad()
def check_features(model: Any, name: str) -> None:
    """Refuse a model whose logits are not its last hidden states times its head.

    Raises:
        ValueError: they are not: it caps or scales its logits, or adds a bias.
    """
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    last, head, _ = read_tokens(model, Tokens(ids, torch.zeros_like(ids)))
    logits = model(input_ids=ids, use_cache=False).logits
    error = ((last @ head.T - logits).abs().max() / logits.abs().max()).item()
    if not error < 1e-2:
        raise ValueError(
            f"The logits of {name} are not its last hidden states times its head (they differ by "
            f"{error:.0%}): it caps, scales or shifts them, which no loss here knows."
        )


@torch.no_grad()
def separates_documents(model: Any) -> bool:
    """Tell whether a document's features are the same alone and behind another one in its row.

    Attention separates documents by their places; a convolution or a recurrent state goes on.
    """
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    segments = (torch.arange(12, device=device) >= 5).long()[None]
    both = read_tokens(model, Tokens(ids, segments)).last[:, 5:]
    alone = read_tokens(model, Tokens(ids[:, 5:], torch.zeros_like(ids[:, 5:]))).last
    return bool((both - alone).abs().max() < 1e-2 * alone.abs().max())
