"""The selective scan on a GPU as one operator, and its backward as another.

Compilers and exporters then see a single node, and autocast leaves it alone: it takes any mix of
bfloat16, float16 and float32, and adds up in float32. The kernels (zoo.kernels.scan_triton) are
imported when the operator first runs; nothing here needs Triton.
"""

import torch
from torch import Tensor

from zoo.kernels.scan_shapes import shape_of_borders

_lib = torch.library.Library("zoo", "FRAGMENT")
_INPUTS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
_tags = (torch.Tag.pt2_compliant_tag,)
# Not torch.library.custom_op, whose checks take half a millisecond a call.
_lib.define(
    f"selective_scan({_INPUTS}, bool delta_softplus, bool save) -> (Tensor, Tensor)", tags=_tags
)
_lib.define(
    f"selective_scan_backward(Tensor dy, {_INPUTS}, Tensor borders, bool delta_softplus)"
    f" -> ({', '.join(['Tensor'] * 7)})",
    tags=_tags,
)


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Scan; with `save`, also the states that the backward starts its blocks from."""
    return torch.ops.zoo.selective_scan(x, delta, A, B, C, D, delta_bias, delta_softplus, save)


@torch.library.impl(_lib, "selective_scan", "CUDA")
def _(x, delta, A, B, C, D, delta_bias, delta_softplus, save):
    from zoo.kernels import scan_triton

    return scan_triton.forward(
        x, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, save=save
    )


@torch.library.register_fake("zoo::selective_scan", lib=_lib)
def _(x, delta, A, B, C, D, delta_bias, delta_softplus, save):
    borders = x.new_empty(shape_of_borders(x, A) if save else (0,), dtype=torch.float32)
    return x.new_empty(x.shape), borders


@torch.library.impl(_lib, "selective_scan_backward", "CUDA")
def _(dy, x, delta, A, B, C, D, delta_bias, borders, delta_softplus):
    from zoo.kernels import scan_triton

    return scan_triton.backward(
        dy, x, delta, A, B, C, D, delta_bias, borders, delta_softplus=delta_softplus
    )


@torch.library.register_fake("zoo::selective_scan_backward", lib=_lib)
def _(dy, x, delta, A, B, C, D, delta_bias, borders, delta_softplus):
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(x), like(delta), like(A), like(B), like(C), like(D), like(delta_bias)


def _setup(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    """Return the gradients of the operator's inputs; the backward's are empty where one is None."""
    if dy is None:
        return (None,) * 9
    x, delta, A, B, C, D, delta_bias, borders = ctx.saved_tensors
    *grads, dD, dbias = torch.ops.zoo.selective_scan_backward(
        dy, x, delta, A, B, C, D, delta_bias, borders, ctx.delta_softplus
    )
    dD = None if D is None else dD
    return *grads, dD, None if delta_bias is None else dbias, None, None


torch.library.register_autograd("zoo::selective_scan", _backward, setup_context=_setup, lib=_lib)
