"""A language model of transformers over texts of which each rank holds a stretch.

Attention goes over heads (Ulysses); the states of Mamba-2 and of Hyena's long filters, and the last
tokens before a short filter, from rank to rank; everything else treats tokens alike. See
`zoo.layers.sequence` for what gradients are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

import zoo.language.hyena_filters as filters
from zoo.language.tokens import SPREAD, TokenFeatures, Tokens, head_of, states_at
from zoo.layers.sequence import (
    Group,
    causal_conv,
    even_lengths,
    key_copies,
    split_tokens,
    states_before,
    tokens_before,
    ulysses_attention,
    world,
)
from zoo.layers.ssd import ssd_over_ranks

NAME = "zoo_ulysses"
"""The attention's name among transformers' implementations."""
HYENA = "zoo_hyena"
KINDS = ("llama", "mixtral", "qwen3", "qwen3_moe", "nemotron", "nemotron_h", HYENA)
"""Model types whose layers are attention, Mamba-2, Hyena and what treats tokens alike."""


class TokenParallel:
    """A model whose rows are spread over ranks; it is changed in place, and its weights are not.

    From then on `read_tokens` reads it through this.

    Args:
        model: A causal language model, one of `KINDS`.
        group: The ranks that hold a row together.

    Raises:
        ValueError: the model is of another type, attends in windows, or its heads do not split.
    """

    def __init__(self, model: Any, group: Group):
        check_model(model, world(group))
        self.model, self.group = model, group
        self.lengths: Sequence[int] = ()
        self.mask: Bool[Tensor, "B 1 T T"] | None = None
        setattr(model, SPREAD, self)
        if model.config.model_type == HYENA:
            _spread_hyena(self, model)
            return
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attend)
        model.set_attn_implementation(NAME)
        for module in model.modules():
            if hasattr(module, "A_log"):
                module.forward = partial(_mamba2, self, module)
            elif hasattr(module, "q_proj"):
                object.__setattr__(module, NAME, self)  # no part of the module: it holds the model

    def split(self, tokens: Tokens, lengths: Sequence[int] | None = None) -> Tokens:
        """Return this rank's stretch of rows that all ranks have; equal ones by default.

        What the next token is (`Tokens.following`) has to be read off the whole rows.
        """
        lengths = lengths or even_lengths(tokens.ids.shape[1], self.group)
        cut = partial(split_tokens, lengths=lengths, group=self.group)
        return replace(tokens, ids=cut(tokens.ids), segments=cut(tokens.segments))

    def read(
        self, tokens: Tokens, lengths: Sequence[int] | None = None, *, at: Sequence[float] = ()
    ) -> TokenFeatures:
        """Read the features of this rank's stretch.

        Args:
            tokens: Whole rows, the same on all ranks of the group.
            lengths: Tokens of each rank; as even as can be by default.
            at: See `read_tokens`.

        Raises:
            ValueError: they do not add up, or a rank has none, which transformers cannot run.
        """
        lengths = lengths or even_lengths(tokens.ids.shape[1], self.group)
        ids = self.split(tokens, lengths).ids
        out = self.run(tokens, lengths, hidden=bool(at), input_ids=ids)
        return TokenFeatures(out.last_hidden_state, head_of(self.model), states_at(out, at))

    def run(
        self, tokens: Tokens, lengths: Sequence[int], *, hidden: bool = False, **stretch: Tensor
    ) -> Any:
        """Run the layers on this rank's stretch, given as `input_ids` or `inputs_embeds`.

        Args:
            tokens: Whole rows, for places and documents.
            hidden: Return the states behind every layer too.

        Returns:
            What transformers returns: `last_hidden_state`, `hidden_states`.

        Raises:
            ValueError: as `read`.
        """
        self.lengths = lengths
        if not min(self.lengths):
            raise ValueError(f"Each rank has a token or more; the lengths are {self.lengths}.")
        segments = tokens.segments
        self.mask = None
        if (segments != segments[:, :1]).any():  # documents do not see each other
            same = segments[:, :, None] == segments[:, None]
            self.mask = same.tril()[:, None]
        places = split_tokens(tokens.places, self.lengths, self.group)
        options: dict[str, Any] = dict(position_ids=places, use_cache=False)
        return self.model.base_model(**stretch, **options, output_hidden_states=hidden)

    def attend(
        self,
        query: Float[Tensor, "B H t D"],
        key: Float[Tensor, "B K t D"],
        value: Float[Tensor, "B K t D"],
        **options: Any,
    ) -> Float[Tensor, "B H t D"]:
        """Attend to what stands before in the same document, on all ranks."""
        masked = dict(attn_mask=self.mask, is_causal=self.mask is None)
        attend = partial(F.scaled_dot_product_attention, **masked, **options)
        return ulysses_attention(query, key, value, self.lengths, self.group, attend=attend)


def check_model(model: Any, num_ranks: int) -> None:
    """Refuse a model whose layers would not know of the other ranks' tokens.

    Raises:
        ValueError: it is of another type than `KINDS`, attends in windows, draws random numbers
            for each token, or its heads do not split.
    """
    config = model.config
    if config.model_type not in KINDS:
        raise ValueError(
            f"Rows of a {config.model_type} cannot be spread over ranks; those of "
            f"{', '.join(KINDS)} can."
        )
    if getattr(config, "sliding_window", None):
        raise ValueError(
            f"The model attends in a window of {config.sliding_window}, which is not spread over "
            "ranks."
        )
    for name, value in vars(config).items():
        if value and (name.endswith("dropout") or name == "router_jitter_noise"):
            raise ValueError(
                f"The model draws random numbers for each token ({name} {value}), which would be "
                f"others on a stretch of a row; set {name} to 0 in its config.json."
            )
    heads = config.num_attention_heads
    key_copies(heads, getattr(config, "num_key_value_heads", heads), num_ranks)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "B H t D"],
    key: Float[Tensor, "B K t D"],
    value: Float[Tensor, "B K t D"],
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "B t H D"], None]:
    """Stand in for an attention function of transformers."""
    if attention_mask is not None:
        raise ValueError("Rows over ranks take no attention mask; documents are told by segments.")
    held: TokenParallel = getattr(module, NAME)
    out = held.attend(query, key, value, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2), None


def _mamba2(
    held: TokenParallel, mixer: Any, x: Float[Tensor, "B t C"], *_: Any, **__: Any
) -> Tensor:
    """Stand in for the forward of Nemotron-H's Mamba-2 (2405.21060), with its own parameters."""
    num_heads, states = mixer.num_heads, mixer.n_groups * mixer.ssm_state_size
    sizes = [mixer.intermediate_size, mixer.conv_dim, num_heads]
    gate, inner, delta = mixer.in_proj(x).split(sizes, dim=-1)
    conv = mixer.conv1d
    inner = mixer.act(causal_conv(inner, conv.weight[:, 0], conv.bias, held.lengths, held.group))
    x, b, c = inner.split([mixer.intermediate_size, states, states], dim=-1)
    x, (b, c) = (
        x.unflatten(2, (num_heads, -1)),
        (t.unflatten(2, (mixer.n_groups, -1)) for t in (b, c)),
    )
    delta = F.softplus(delta + mixer.dt_bias).clamp(*mixer.time_step_limit)
    decay = -torch.exp(mixer.A_log.float())
    out = ssd_over_ranks(x, delta, decay, b, c, held.group, chunk=mixer.chunk_size)
    out = (out + x * mixer.D[:, None]).flatten(2)
    return mixer.out_proj(mixer.norm(out, gate).to(gate.dtype))


class _TokensBefore:
    """What a Hyena operator asks of the state of its layer; here other ranks hold it."""

    def __init__(self, held: TokenParallel):
        self.held, self.tensors = held, dict(begun=torch.empty(0))

    def before(self, name: str, x: Tensor, count: int) -> Tensor:
        return tokens_before(x, count, self.held.lengths, self.held.group)


def _spread_hyena(held: TokenParallel, model: Any) -> None:
    from zoo.language.hyena import Hyena, HyenaAttention, LongHyena

    state = _TokensBefore(held)
    for module in model.modules():
        replaced: dict[str, Any] = {}
        if isinstance(module, Hyena):
            replaced["mix"] = partial(_with_state, type(module).mix, module, state)
        if isinstance(module, LongHyena):
            replaced["_sum"] = partial(_modal_sum, held)
        if isinstance(module, HyenaAttention):
            replaced["mix"] = partial(_hyena_attention, held, module.head_dim)
        vars(module).update(replaced)


def _with_state(mix: Callable[..., Tensor], operator: Any, state: Any, p: Tensor, _: Any) -> Tensor:
    return mix(operator, p, state)


def _modal_sum(
    held: TokenParallel, u: Tensor, poles: Tensor, residues: Tensor, _: Any
) -> Float[Tensor, "B t W"]:
    """Convolve with a sum of exponentials (2503.01868), from the state that earlier ranks leave."""
    length = u.shape[1]
    rest = torch.exp(poles * length)
    before = states_before(filters.modal_state(u, poles), rest, held.group)
    y = filters.fft(u, filters.modal_filter(poles, residues, length))
    left = residues * before * poles.exp()
    return y + filters.modal_filter(poles, left, length).transpose(1, 2)


def _hyena_attention(
    held: TokenParallel, head_dim: int, p: Tensor, _: Any, rotation: Any, mask: Any
) -> Float[Tensor, "B t W"]:
    from zoo.language.hyena import rotated

    q, k, v = p.unflatten(2, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    return held.attend(rotated(q, rotation), rotated(k, rotation), v).transpose(1, 2).flatten(2)


def add_over_ranks(parameters: Sequence[Tensor], group: Group) -> None:
    """Add the gradients of weights that all ranks have up, in place; one that is missing is 0."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
