"""A dense language model of transformers as a mixture of experts, and back: tensors and configs."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.language.upcycling import Router, Scale, Upcycling

State = dict[str, Tensor]

BECOMES = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen3": "qwen3_moe",
    "nemotron_h": "nemotron_h",
}
"""transformers' model type of the dense model, and of the mixture."""
ROUTERS: dict[str, tuple[Router, ...]] = {
    "mixtral": ("topk-softmax",),
    "qwen3_moe": ("topk-softmax", "softmax-topk"),
    "nemotron_h": ("topk-softmax",),
}
"""Orders that a class can compute. Mixtral's (softmax, top-k, division by the sum) is the first;
NemotronH has sigmoids for exponentials, and its weights sum to 1 as well."""
SHARED = 64
"""Width of NemotronH's shared expert, which its class cannot be without: it begins at nothing."""
OF_EXPERTS = (
    "n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob",
)  # fmt: skip
"""Fields that a dense NemotronH has and does not read."""
MARK = "upcycled"
"""Field of a mixture's config with what it was made from."""


class Dense(NamedTuple):
    """An MLP: down(act(gate) * up), or down(act(up)); weights as of linear layers."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None


class Experts(NamedTuple):
    """Packed as transformers packs them: [N f C], [N C f], [N f C]."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None


def matrix_scales(scale: Scale, s: float, *, gated: bool) -> tuple[float, float, float]:
    """Return the factors of up, down and gate among which a scale is spread.

    Raises:
        ValueError: a square root of each, for an MLP whose activation squares it again.
    """
    if scale == "down":
        return 1.0, s, 1.0
    if scale == "cube-root":
        root = s ** (1 / 3)
        return root, root, root
    if not gated:
        raise ValueError(
            "--scale square-root is for gated MLPs: squared ReLU would make s^1.5 of it. Take down "
            "or cube-root, both exact here."
        )
    return math.sqrt(s), math.sqrt(s), 1.0


def to_experts(mlp: Dense, how: Upcycling, scales: tuple[float, float, float]) -> Experts:
    """Cut an MLP's channels into shards, and copy each: expert e G + g is copy e of shard g."""

    def rows(weight: Tensor, factor: float) -> Tensor:
        shards = scaled(weight, factor).unflatten(0, (how.groups, -1))
        return shards.repeat(how.experts, 1, 1)

    up, down, gate = scales
    return Experts(
        rows(mlp.up, up),
        rows(mlp.down.T, down).transpose(1, 2).contiguous(),
        None if mlp.gate is None else rows(mlp.gate, gate),
    )


def to_dense(experts: Experts, copies: int, scales: tuple[float, float, float], kept: int) -> Dense:
    """Put one copy of each shard together again: the inverse of `to_experts`.

    It returns the same bits where the scales are powers of two, as is 1.

    Args:
        kept: Which copy, from 0.
    """
    up, down, gate = scales

    def rows(weight: Tensor, factor: float) -> Tensor:
        return scaled(weight.chunk(copies)[kept].flatten(0, 1), 1 / factor)

    return Dense(
        rows(experts.up, up),
        rows(experts.down.transpose(1, 2), down).T.contiguous(),
        None if experts.gate is None else rows(experts.gate, gate),
    )


def scaled(weight: Tensor, factor: float) -> Tensor:
    """Multiply in float64 and round once; by 1, the weight as it is."""
    return weight if factor == 1 else (weight.double() * factor).to(weight.dtype)


def router_rows(how: Upcycling, norm: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw the router of a layer: a random row for each copy, repeated for its shards.

    Shards of a copy are neighbours: where logits of two copies tie, as 4 in 1,000 do in
    bfloat16, CUDA's top-k takes the first ones, which are one copy's.

    Args:
        norm: Gain of the norm before it. Its output has about this length, so that rows of
            deviation σ / |gain| give logits of deviation σ.

    Returns:
        [N C].
    """
    rows = torch.randn(how.experts, len(norm), generator=generator, dtype=torch.float64)
    length = norm.double().norm().cpu()
    rows = (rows * how.deviation / length).to(norm)
    return rows.repeat_interleave(how.groups, dim=0)


# Models


def mixture_config(config: Any, how: Upcycling) -> Any:
    """Return the config of the mixture that a dense model becomes.

    Raises:
        ValueError: transformers has no mixture of this class, or none that computes this.
    """
    from transformers import AutoConfig

    check_class(config, how)
    kind = BECOMES[config.model_type]
    fields = shared_fields(config, kind)
    width = config.intermediate_size // how.groups
    fields |= dict(num_experts_per_tok=how.top_k)
    if kind == "mixtral":
        fields |= dict(intermediate_size=width, num_local_experts=how.num_experts)
    elif kind == "qwen3_moe":
        fields |= dict(moe_intermediate_size=width, num_experts=how.num_experts)
        fields |= dict(norm_topk_prob=how.router == "topk-softmax", mlp_only_layers=[])
        fields |= dict(decoder_sparse_step=1)
    else:
        layers = ["moe" if kind == "mlp" else kind for kind in config.layers_block_type]
        fields |= dict(layers_block_type=layers, moe_intermediate_size=width)
        fields |= dict(n_routed_experts=how.num_experts, n_group=1, topk_group=1)
        fields |= dict(norm_topk_prob=True, moe_latent_size=None)
        fields |= dict(moe_shared_expert_intermediate_size=min(SHARED, width))
        fields |= dict(routed_scaling_factor=how.output_scale if how.scale == "down" else 1.0)
    found = AutoConfig.for_model(kind, **fields)
    setattr(found, MARK, dict(model_type=config.model_type, **asdict(how)))
    return found


def shared_fields(config: Any, kind: str) -> dict[str, Any]:
    """Return the fields of a config that another model type has too."""
    from transformers import AutoConfig

    # Qwen3-MoE reads a head_dim that its config does not declare.
    known = {*AutoConfig.for_model(kind).to_dict(), "head_dim"} - {"model_type", "architectures"}
    return {k: copy.deepcopy(v) for k, v in config.to_dict().items() if k in known and k != MARK}


def check_class(config: Any, how: Upcycling) -> None:
    """Refuse a model that transformers has no equal mixture of.

    Raises:
        ValueError: it is of another class, is a mixture already, has biases or windows that the
            mixture's class lacks, its class has another router, or its MLPs do not split.
    """
    kind = config.model_type
    if kind not in BECOMES:
        why = " (transformers has no mixture of its class)" if kind == "nemotron" else ""
        raise ValueError(
            f"A model of type {kind} cannot be upcycled{why}; those that can are "
            f"{', '.join(BECOMES)}."
        )
    if how.router not in ROUTERS[BECOMES[kind]]:
        able = [k for k, v in BECOMES.items() if how.router in ROUTERS[v]]
        raise ValueError(
            f"{BECOMES[kind]} divides the chosen weights by their sum, which is topk-softmax; "
            f"--router {how.router} is for {', '.join(able)}."
        )
    biases = ["mlp_bias"] + (["attention_bias"] if BECOMES[kind] == "mixtral" else [])
    if found := [name for name in biases if getattr(config, name, False)]:
        raise ValueError(f"The model has {found[0]}, for which {BECOMES[kind]} has no place.")
    if kind == "nemotron_h" and "moe" in config.layers_block_type:
        raise ValueError("The model is a mixture of experts already.")
    if kind == "nemotron_h" and "mlp" not in config.layers_block_type:
        raise ValueError("The model has no MLP that could become experts.")
    width = config.intermediate_size
    if width % how.groups:
        fits = [g for g in range(1, width + 1) if width % g == 0]
        near = min(fits, key=lambda g: abs(g - how.groups))
        raise ValueError(
            f"{width} channels of an MLP do not split into --groups {how.groups}; the nearest is "
            f"{near}."
        )
    if kind == "qwen3" and "sliding_attention" in config.layer_types:
        raise ValueError("Some layers attend in a window; qwen3_moe has one for all or for none.")


def mixture_state(state: Mapping[str, Tensor], config: Any, how: Upcycling, seed: int) -> State:
    """Return the mixture's tensors, by the names of its class.

    Args:
        state: The dense model's.
        config: The dense model's.
        seed: Of the routers.
    """
    scales = inner_scales(config.model_type, how)
    generator = torch.Generator().manual_seed(seed)
    found = dict(state)
    for prefix, norm in dense_mlps(state):
        names = {n: f"{prefix}.{n}_proj.weight" for n in ("up", "down", "gate")}
        mlp = Dense(*(found.pop(name, None) for name in names.values()))  # pyright: ignore
        experts = to_experts(mlp, how, scales)
        router = router_rows(how, state[norm], generator)
        found[f"{prefix}.gate.weight"] = router
        found[f"{prefix}.experts.down_proj"] = experts.down
        if experts.gate is not None:
            packed = torch.cat([experts.gate, experts.up], dim=1)
            found[f"{prefix}.experts.gate_up_proj"] = packed
            continue
        found[f"{prefix}.experts.up_proj"] = experts.up
        found[f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(len(router)).to(mlp.up.device)
        width, dim = min(SHARED, experts.up.shape[1]), mlp.up.shape[1]
        shared = torch.randn(width, dim, generator=generator) * config.initializer_range
        found[f"{prefix}.shared_experts.up_proj.weight"] = shared.to(mlp.up)
        found[f"{prefix}.shared_experts.down_proj.weight"] = mlp.down.new_zeros(dim, width)
    return found


def dense_mlps(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the names of each MLP of a state dict, and of the gain of the norm before it."""
    for name in state:
        prefix = name.removesuffix(".down_proj.weight")
        if prefix != name:
            layer = prefix.rpartition(".")[0]
            norms = (f"{layer}.{n}.weight" for n in ("post_attention_layernorm", "norm"))
            yield prefix, next(norm for norm in norms if norm in state)


def upcycling_of(config: Any) -> tuple[str, Upcycling]:
    """Return what a mixture was made from: the dense model's type, and how.

    Raises:
        ValueError: it was not made by upcycling.
    """
    mark = dict(getattr(config, MARK, None) or {})
    if not mark:
        raise ValueError(
            "The model was not made by zoo upcycle (config.json has no field upcycled), so it has "
            "no dense model inside."
        )
    return mark.pop("model_type"), Upcycling(**mark)


def dense_config(config: Any) -> Any:
    """Return the config of the dense model inside a mixture.

    Raises:
        ValueError: as `upcycling_of`.
    """
    from transformers import AutoConfig

    kind, how = upcycling_of(config)
    fields = shared_fields(config, kind)
    width = config.intermediate_size if config.model_type == "mixtral" else None
    width = width or config.moe_intermediate_size
    fields["intermediate_size"] = width * how.groups
    if kind == "nemotron_h":
        plain = ["mlp" if kind == "moe" else kind for kind in config.layers_block_type]
        fields = {k: v for k, v in fields.items() if k not in OF_EXPERTS}
        fields["layers_block_type"] = plain
    return AutoConfig.for_model(kind, **fields)


def dense_state(state: Mapping[str, Tensor], config: Any, kept: int = 0) -> State:
    """Return the dense model inside a mixture: one copy of each shard, the scale taken out.

    Right after upcycling it has the dense model's bits where `scale_is_exact`.

    Raises:
        ValueError: there is no such copy, or as `upcycling_of`.
    """
    kind, how = upcycling_of(config)
    if not 0 <= kept < how.experts:
        raise ValueError(f"--copy is {kept}; there are {how.experts}, from 0.")
    scales = inner_scales(kind, how)
    found = dict(state)
    for name in list(found):
        prefix = name.removesuffix(".experts.down_proj")
        if prefix == name:
            continue
        down = found.pop(name)
        if f"{prefix}.experts.gate_up_proj" in found:
            gate, up = found.pop(f"{prefix}.experts.gate_up_proj").chunk(2, dim=1)
        else:
            gate, up = None, found.pop(f"{prefix}.experts.up_proj")
        mlp = to_dense(Experts(up, down, gate), how.experts, scales, kept)
        for other in [n for n in found if n.startswith((f"{prefix}.gate.", f"{prefix}.shared"))]:
            found.pop(other)
        for part, weight in mlp._asdict().items():
            if weight is not None:
                found[f"{prefix}.{part}_proj.weight"] = weight
    return found


def inner_scales(kind: str, how: Upcycling) -> tuple[float, float, float]:
    """Return the factors that are in a mixture's weights; NemotronH has one in its config."""
    gated = kind != "nemotron_h"
    s = 1.0 if not gated and how.scale == "down" else how.output_scale
    return matrix_scales(how.scale, s, gated=gated)


def scale_is_exact(kind: str, how: Upcycling) -> bool:
    """Tell whether dividing a mixture's weights by its scale gives the dense model's bits."""
    return all(math.frexp(factor)[0] == 0.5 for factor in inner_scales(kind, how))
