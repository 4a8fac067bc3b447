"""Nemotron-H and Mamba-2 of transformers, and a forward pass of their weights that trains fast.

transformers' plain scan, which runs where mamba-ssm is not installed, expands every group's B and C
to its heads and sums segments in float32. Here chunks are products of matrices (`zoo.layers.ssd`),
a group's scores are made once, and each layer is one function of tensors, which `torch.compile`
takes whole.
"""

from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.layers.ssd import ssd


def fast(model: Any, *, compiled: bool) -> Any:
    """Let a Nemotron-H or a Mamba-2 run through the functions of this file, and return it.

    Its modules are not called, so hooks on them see nothing.

    Args:
        compiled: Compile each kind of layer; takes seconds for each new size.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # sizes times training, evaluation and teacher
    model.base_model.forward = MethodType(partial(_forward, compiled=compiled), model.base_model)
    return model


def _forward(tower: Any, input_ids: Tensor, *, compiled: bool = False, **options: Any) -> Any:
    from transformers.modeling_outputs import MoeModelOutputWithPast

    del options  # no cache, no padding
    x = tower.embeddings(input_ids)
    for block in tower.layers:
        layer, tensors, numbers = _layer(block.mixer)
        run = _compiled(layer) if compiled else layer
        norm = block.norm
        x = run(x, norm.weight, *tensors, eps=norm.variance_epsilon, **numbers)
    last = F.rms_norm(x, x.shape[-1:], tower.norm_f.weight, tower.norm_f.variance_epsilon)
    return MoeModelOutputWithPast(last_hidden_state=last)


@cache
def _compiled(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(layer, dynamic=False)


def _layer(m: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]:
    """Return a mixer's function, its tensors and its numbers."""
    if hasattr(m, "in_proj"):
        tensors = (m.in_proj.weight, m.conv1d.weight, m.conv1d.bias, m.dt_bias, m.A_log, m.D)
        numbers = dict(groups=m.n_groups, state=m.ssm_state_size, least=m.time_step_limit[0])
        return mamba_layer, (*tensors, m.norm.weight, m.out_proj.weight), numbers
    if hasattr(m, "q_proj"):
        projections = (m.q_proj, m.k_proj, m.v_proj, m.o_proj)
        return attention_layer, tuple(p.weight for p in projections), dict(head_dim=m.head_dim)
    return mlp_layer, (m.up_proj.weight, m.down_proj.weight), {}


def mlp_layer(x: Tensor, norm: Tensor, up: Tensor, down: Tensor, *, eps: float) -> Tensor:
    """Add a feed-forward layer with squared ReLU to the stream, [B T D]."""
    y = F.rms_norm(x, x.shape[-1:], norm, eps)
    return x + F.linear(F.relu(F.linear(y, up)).square(), down)


def attention_layer(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    *,
    head_dim: int,
    eps: float,
) -> Tensor:
    """Add causal attention, whose query heads share keys, to the stream; it knows no positions."""
    y = F.rms_norm(x, x.shape[-1:], norm, eps)
    q, k, v = [F.linear(y, w).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w in (q, k, v)]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return x + F.linear(y.transpose(1, 2).flatten(2), o)


def mamba_layer(
    x: Tensor,
    norm: Tensor,
    in_proj: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    skip: Tensor,
    gate_norm: Tensor,
    out_proj: Tensor,
    *,
    groups: int,
    state: int,
    least: float,
    eps: float,
) -> Tensor:
    """Add a Mamba-2 layer (2405.21060) to the stream, [B T D].

    Args:
        least: Smallest time step.
    """
    inner, heads, length = out_proj.shape[1], len(a_log), x.shape[1]
    y = F.linear(F.rms_norm(x, x.shape[-1:], norm, eps), in_proj)
    gate, y, dt = y.split([inner, len(conv), heads], -1)
    taps = F.pad(y, (0, 0, conv.shape[-1] - 1, 0))
    y = sum(taps[:, i : i + length] * w for i, w in enumerate(conv[:, 0].unbind(-1)))
    y, b, c = F.silu(y + conv_bias).split([inner, groups * state, groups * state], -1)
    wide = torch.promote_types(dt.dtype, torch.float32)
    dt = F.softplus(dt.to(wide) + dt_bias).clamp(min=least)
    y, b, c = (part.unflatten(-1, (n, -1)) for part, n in ((y, heads), (b, groups), (c, groups)))
    y = ssd(y, dt, -a_log.to(wide).exp(), b, c).out + skip[:, None] * y
    y = (y.flatten(2).to(wide) * F.silu(gate.to(wide))).unflatten(-1, (groups, -1))
    y = F.rms_norm(y, y.shape[-1:], None, eps).flatten(2) * gate_norm
    return x + F.linear(y, out_proj)
