"""StripedHyena 2: short, medium and long convolutions behind gates, and attention (2503.01868).

A layer is one of four operators, written as a letter of the pattern:

    s   SE  an explicit filter of 7 taps
    m   MR  an explicit filter of 128 taps
    l   LI  an implicit filter as long as the text: a sum of exponentials
    a   attention with rotary positions

and a gated MLP. The first three share one shape (equation 1):

    x2, x1, v = short convolutions of W x,    y = W_out (x2 * (g * (x1 v)))

Neighbouring channels share a filter. Two things differ between the operators in released weights
(checked against them, see `tests/golden/README_hyena.md`): SE's filter is stored with the present
last and has no skip; MR's is stored with the present first, and MR and LI add D (x1 v).

Text of any length is read in one pass, whose cost grows as the length (times its logarithm, for
LI's transforms); with a cache it is continued token by token from states that do not grow, or by
many tokens at once. Tokens that `attention_mask` hides are as if they had never been, so prompts
may be padded on the left. A row is one document: convolutions do not stop where another begins.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import zoo.language.hyena_filters as filters
from zoo import axes
from zoo.kernels import short_conv
from zoo.kernels.available import runs_kernels
from zoo.language.hyena_cache import HyenaCache, LayerState
from zoo.language.hyena_config import HyenaConfig

__all__ = ["HyenaCache", "HyenaConfig", "HyenaForCausalLM", "HyenaModel"]

SHAPES = """
[zoo.HyenaModel] C>hidden_size #layers>pattern
embed_tokens.weight         _, C
norm.weight                 C

[zoo.HyenaForCausalLM]
lm_head.weight              _, C

[zoo.HyenaLayer]
operator_norm.weight        C
mlp_norm.weight             C

-- g filters for p channels each; a channel's x2, x1 and v stand together. s: exponentials
[zoo.ShortHyena] g>se_groups g*p>se_width
in_proj.weight              g p 3, C
feature_filter              g p 3, 1, _
filter                      g, 1, _
out_proj.weight             C, g p

[zoo.MediumHyena] g>mr_groups g*p>mr_width
in_proj.weight              g p 3, C
feature_filter              g p 3, 1, _
filter                      g, 1, _
skip                        g p
out_proj.weight             C, g p

[zoo.LongHyena] p>li_width s>li_order
in_proj.weight              p 3, C
feature_filter              p 3, 1, _
log_poles                   p, s, 1
residues                    p, s
skip                        p
out_proj.weight             C, p

[zoo.HyenaAttention] d=head_dim h>num_attention_heads d>head_dim !!d:rope
qkv.weight                  3 h d, C
out_proj.weight             C, h d

[zoo.HyenaMlp] f>intermediate_size
gate.weight                 f, C
up.weight                   f, C
down.weight                 C, f
"""
axes.register(SHAPES)

Rotation = tuple[Float[Tensor, "B 1 T half"], Float[Tensor, "B 1 T half"]]
"""Cosines and sines of the positions' angles."""


class HyenaRMSNorm(nn.Module):
    """Divide by the root of the mean square, plus eps: it is added to the root, not inside it."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        root = exact.square().mean(-1, keepdim=True).sqrt()
        return self.weight * (exact / (root + self.eps)).to(x.dtype)


class HyenaMlp(nn.Module):
    """A gated MLP; with an identity for its activation it is bilinear."""

    def __init__(self, config: HyenaConfig, activation: str):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.activation = nn.GELU() if activation == "gelu" else nn.Identity()

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Hyena(nn.Module):
    """What SE, MR and LI share: projections, short convolutions, gates."""

    uses_kernels = True
    """Read whole texts by kernels where there are some; otherwise in torch."""

    def __init__(self, config: HyenaConfig, width: int):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.feature_filter = nn.Parameter(torch.empty(3 * width, 1, config.feature_length))
        self.out_proj = nn.Linear(width, config.hidden_size)

    def forward(
        self, x: Float[Tensor, "B T C"], state: LayerState | None = None
    ) -> Float[Tensor, "B T C"]:
        return self.out_proj(self.mix(self.in_proj(x), state))

    def mix(
        self, p: Float[Tensor, "B T W3"], state: LayerState | None = None
    ) -> Float[Tensor, "B T W"]:
        """Mix the projected tokens: all of the operator but its two linear layers."""
        if self._runs_kernels(p, state):
            x2, u = short_conv.short_conv_gates(p, self.feature_filter[:, 0])
            if state is not None:
                state.before("features", p, self.feature_filter.shape[2] - 1)
        else:
            x2, x1, v = self.features(p, state)
            u = x1 * v
        return x2 * self.convolve(u, state)

    def features(
        self, p: Float[Tensor, "B T W3"], state: LayerState | None = None
    ) -> tuple[Tensor, ...]:
        """Convolve the projections with their short filters: x2, x1 and v."""
        g = self.feature_filter[:, 0].flip(1)
        before = None if state is None else state.before("features", p, g.shape[1] - 1)
        return filters.convolve(p, g, before).unflatten(2, (-1, 3)).unbind(-1)

    def _runs_kernels(self, p: Tensor, state: LayerState | None) -> bool:
        """Say whether a kernel reads these tokens: the first ones of a text, without gradients."""
        taps = self.feature_filter
        learns = torch.is_grad_enabled() and (p.requires_grad or taps.requires_grad)
        begins = state is None or not state.tensors
        fits = taps.shape[2] == 3 and p.shape[1] > 1
        return self.uses_kernels and begins and fits and not learns and runs_kernels(p, taps)

    def convolve(
        self, u: Float[Tensor, "B T W"], state: LayerState | None = None
    ) -> Float[Tensor, "B T W"]:
        """Convolve the gated values with the operator's own filter, from the state if any."""
        raise NotImplementedError

    def start(self, std: float) -> None:
        """Initialise the filters."""
        init.normal_(self.feature_filter, std=self.feature_filter.shape[-1] ** -0.5)


class ShortHyena(Hyena):
    """SE: an explicit filter of a few taps, shared by the channels of a group; no skip."""

    def __init__(self, config: HyenaConfig):
        super().__init__(config, cast(int, config.se_width))
        self.filter = nn.Parameter(torch.empty(config.se_groups, 1, config.se_length))

    def mix(
        self, p: Float[Tensor, "B T W3"], state: LayerState | None = None
    ) -> Float[Tensor, "B T W"]:
        if self.filter.shape[2] > filters.DIRECT or not self._runs_kernels(p, state):
            return super().mix(p, state)
        g = self.filter[:, 0].flip(1)
        y = short_conv.short_conv_filtered(p, self.feature_filter[:, 0], g)
        if state is not None:  # what the kernel kept to itself, of the last tokens
            tail = p[:, -(self.feature_filter.shape[2] + g.shape[1]) :]
            _, x1, v = self.features(tail)
            state.before("features", p, self.feature_filter.shape[2] - 1)
            state.before("filter", x1 * v, g.shape[1] - 1)
        return y

    def convolve(
        self, u: Float[Tensor, "B T W"], state: LayerState | None = None
    ) -> Float[Tensor, "B T W"]:
        g = self.filter[:, 0].flip(1)  # stored with the present last
        before = None if state is None else state.before("filter", u, g.shape[1] - 1)
        return filters.convolve(u, g, before)

    def start(self, std: float) -> None:
        super().start(std)
        init.normal_(self.filter, std=self.filter.shape[-1] ** -0.5)


class MediumHyena(Hyena):
    """MR: an explicit filter of a hundred taps, which falls off at a rate of its own, and a skip.

    The decay exp(-r t), with r from 0.01 to 100 over the groups, is how filters start; released
    ones have what it became.
    """

    def __init__(self, config: HyenaConfig):
        super().__init__(config, cast(int, config.mr_width))
        self.filter = nn.Parameter(torch.empty(config.mr_groups, 1, config.mr_length))
        self.skip = nn.Parameter(torch.ones(cast(int, config.mr_width)))

    def convolve(
        self, u: Float[Tensor, "B T W"], state: LayerState | None = None
    ) -> Float[Tensor, "B T W"]:
        g = self.filter[:, 0]
        before = None if state is None else state.before("filter", u, g.shape[1] - 1)
        return torch.addcmul(filters.convolve(u, g, before), self.skip, u)

    def start(self, std: float) -> None:
        super().start(std)
        groups, _, taps = self.filter.shape
        device = self.filter.device
        rates = torch.logspace(-2, 2, groups, device=device)[:, None]
        fall = torch.exp(-rates * torch.arange(taps, device=device))
        g = torch.randn(groups, taps, device=device) * taps**-0.5 * fall
        init.copy_(self.filter, g[:, None].to(self.filter))
        init.ones_(self.skip)


class LongHyena(Hyena):
    """LI: a filter as long as the text, the sum of `li_order` exponentials a channel, and a skip.

    Its arithmetic is in float32 at least, as that of released weights.
    """

    def __init__(self, config: HyenaConfig):
        width = cast(int, config.li_width)
        super().__init__(config, width)
        self.log_poles = nn.Parameter(torch.empty(width, config.li_order, 1))
        self.residues = nn.Parameter(torch.empty(width, config.li_order))
        self.skip = nn.Parameter(torch.ones(width))

    def convolve(
        self, u: Float[Tensor, "B T W"], state: LayerState | None = None
    ) -> Float[Tensor, "B T W"]:
        exact = torch.promote_types(u.dtype, torch.float32)
        poles, residues = self.log_poles[..., 0].to(exact), self.residues.to(exact)
        with torch.autocast(u.device.type, enabled=False):  # its products are of exponentials
            y = self._sum(u.to(exact), poles, residues, state).to(u.dtype)
        return torch.addcmul(y, self.skip, u)

    def _sum(
        self, u: Tensor, poles: Tensor, residues: Tensor, state: LayerState | None
    ) -> Float[Tensor, "B T W"]:
        length = u.shape[1]
        before = None if state is None else state.tensors.get("modes")
        if state is not None and before is not None and length == 1:
            y, state.tensors["modes"] = filters.modal_step(u, poles, residues, before)
            return y
        y = filters.fft(u, filters.modal_filter(poles, residues, length))
        if before is not None:  # what earlier tokens still add
            left = residues * before * poles.exp()
            y = y + filters.modal_filter(poles, left, length).transpose(1, 2)
        if state is not None:
            state.tensors["modes"] = filters.modal_state(u, poles, before)
        return y

    def start(self, std: float) -> None:
        super().start(std)
        width, order = self.residues.shape
        # Memories from a few tokens to thousands of them.
        spans = torch.logspace(0, 4, order, device=self.residues.device).expand(width, -1)
        init.copy_(self.log_poles, -1 / spans[..., None].to(self.log_poles))
        init.normal_(self.residues, std=order**-0.5 * 0.1)
        init.ones_(self.skip)


class HyenaAttention(nn.Module):
    """Causal attention with rotary positions; its out-projection has a bias."""

    def __init__(self, config: HyenaConfig):
        super().__init__()
        self.head_dim = cast(int, config.head_dim)
        width = config.num_attention_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: LayerState | None,
        rotation: Rotation,
        mask: Bool[Tensor, "B 1 T S"] | None,
    ) -> Float[Tensor, "B T C"]:
        return self.out_proj(self.mix(self.qkv(x), state, rotation, mask))

    def mix(
        self,
        p: Float[Tensor, "B T W3"],
        state: LayerState | None,
        rotation: Rotation,
        mask: Bool[Tensor, "B 1 T S"] | None,
    ) -> Float[Tensor, "B T W"]:
        """Attend; without a mask, to all tokens so far."""
        q, k, v = p.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, rotation), rotated(k, rotation)
        if state is not None:
            k, v = state.appended("keys", k), state.appended("values", v)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return y.transpose(1, 2).flatten(2)


def rotated(x: Float[Tensor, "B H T d"], rotation: Rotation) -> Float[Tensor, "B H T d"]:
    """Turn each pair of channels (j, j + d / 2) by the angle of its position."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


OPERATORS = {"s": ShortHyena, "m": MediumHyena, "l": LongHyena, "a": HyenaAttention}


class HyenaLayer(GradientCheckpointingLayer):
    """One letter of the pattern and its MLP."""

    def __init__(self, config: HyenaConfig, index: int):
        super().__init__()
        self.operator_norm = HyenaRMSNorm(config.hidden_size, config.norm_eps)
        self.operator = OPERATORS[config.pattern[index]](config)
        self.mlp_norm = HyenaRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = HyenaMlp(config, cast(list[str], config.mlp_activations)[index])

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        state: LayerState | None,
        rotation: Rotation | None,
        mask: Bool[Tensor, "B 1 T S"] | None,
        shown: Float[Tensor, "B T 1"] | None,
    ) -> Float[Tensor, "B T C"]:
        y = self.operator_norm(x)
        if isinstance(self.operator, HyenaAttention):
            assert rotation is not None
            x = x + self.operator(y, state, rotation, mask)
        else:  # hidden tokens are zeros, as are those before the first
            x = x + self.operator(y if shown is None else y * shown, state)
        return x + self.mlp(self.mlp_norm(x))


class HyenaPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family."""

    config_class = HyenaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyenaLayer"]  # noqa: RUF012  transformers' own name and kind
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["log_poles", "residues"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, HyenaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Hyena):
            module.start(std)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a `HyenaCache`


class HyenaModel(HyenaPreTrainedModel):
    """The tower: tokens in, hidden states after the final norm out."""

    def __init__(self, config: HyenaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyenaLayer(config, i) for i in range(len(config.pattern)))
        self.norm = HyenaRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: HyenaCache | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens, all at once or behind those that a cache has seen.

        Args:
            attention_mask: [B, tokens so far]; 0 hides a token, and those stand before all others.

        Raises:
            ValueError: there are more tokens than positions, or neither or both kinds of input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if use_cache and cache is None:
            cache = HyenaCache(len(self.layers))
        if cache is not None and not isinstance(cache, HyenaCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; StripedHyena 2 keeps other things: "
                "give a HyenaCache, or none at first."
            )
        past, length = 0 if cache is None else cache.length, x.shape[1]
        self._check_length(past + length)
        if attention_mask is not None and _hides_nothing(attention_mask):
            attention_mask = None
        rotation = self._rotation(x, position_ids, attention_mask, past)
        mask = attention_mask_for(attention_mask, length, past, x.device)
        shown = None if attention_mask is None else attention_mask[:, -length:, None].to(x.dtype)
        states = [x] if output_hidden_states else []
        for i, layer in enumerate(self.layers):
            state = None if cache is None else cast(Any, cache.layers[i])
            x = layer(x, state, rotation, mask, shown)
            states += [x] if output_hidden_states else []
        x = self.norm(x)
        if cache is not None:
            cache.length = past + length
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states[:-1], x) if states else None,
        )

    def _check_length(self, length: int) -> None:
        most = self.config.max_position_embeddings
        if length > most:
            raise ValueError(
                f"A sequence of {length:,} tokens is longer than the {most:,} positions of this "
                "model (max_position_embeddings): shorten it, or raise that together with "
                "rotary_divisor."
            )

    def _rotation(
        self, x: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> Rotation | None:
        if "a" not in self.config.pattern:
            return None
        length = x.shape[1]
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        exact = torch.promote_types(x.dtype, torch.float32)
        dim = cast(int, self.config.head_dim)
        steps = torch.arange(0, dim, 2, device=x.device, dtype=exact) / dim
        places = position_ids[:, None, :, None].to(exact) / self.config.rotary_divisor
        angles = places * self.config.rotary_base**-steps
        return angles.cos(), angles.sin()


def _hides_nothing(mask: Tensor) -> bool:
    """Look at a mask, which waits for the device; a compiler must not."""
    return not torch.compiler.is_compiling() and bool(mask.all())


def attention_mask_for(
    shown: Tensor | None, length: int, past: int, device: torch.device
) -> Bool[Tensor, "B 1 T S"] | None:
    """Return which tokens each may attend to, None where a causal or no mask says it all."""
    if shown is None and (past == 0 or length == 1):
        return None
    places = torch.arange(past + length, device=device)
    mask = places <= places[past:, None]
    if shown is not None:
        # A hidden token attends to itself, for a softmax of nothing is not a number.
        mask = (mask & shown[:, None].bool()) | (places == places[past:, None])
        return mask[:, None]
    return mask[None, None]


class HyenaForCausalLM(HyenaPreTrainedModel, GenerationMixin):
    """The tower with its embedding as the head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HyenaConfig):
        super().__init__(config)
        self.model = HyenaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: HyenaCache | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the mean loss of the next token where `labels` are given.

        Args:
            labels: The tokens themselves; -100 counts nothing.
            logits_to_keep: Of how many of the last tokens logits are wanted; 0 for all.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )
