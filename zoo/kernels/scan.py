"""The selective scan on a GPU as one operator, and its backward as another.

Compilers and exporters see a single node, and autocast leaves it alone: it takes any mix of
bfloat16, float16 and float32, and sums in float32. The kernels (zoo.kernels.scan_triton) are
imported when the operator first runs; nothing here needs Triton.
"""

import torch
from torch import Tensor

from zoo.kernels.operator import register
from zoo.kernels.scan_shapes import saved_states_shape

_INPUTS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"


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
    """Return y and, with `save`, the states that the backward pass starts its blocks from.

    Arguments as for `zoo.layers.scan.selective_scan`; the states are empty without `save`.
    """
    return torch.ops.zoo.selective_scan(x, delta, A, B, C, D, delta_bias, delta_softplus, save)


def _cuda(x, delta, A, B, C, D, delta_bias, delta_softplus, save):
    from zoo.kernels import scan_triton

    return scan_triton.forward(
        x, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, save=save
    )


def _fake(x, delta, A, B, C, D, delta_bias, delta_softplus, save):
    saved_states = x.new_empty(saved_states_shape(x, A) if save else (0,), dtype=torch.float32)
    return x.new_empty(x.shape), saved_states


def _cuda_backward(dy, x, delta, A, B, C, D, delta_bias, saved_states, delta_softplus):
    from zoo.kernels import scan_triton

    return scan_triton.backward(
        dy, x, delta, A, B, C, D, delta_bias, saved_states, delta_softplus=delta_softplus
    )


def _fake_backward(dy, x, delta, A, B, C, D, delta_bias, saved_states, delta_softplus):
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(x), like(delta), like(A), like(B), like(C), like(D), like(delta_bias)


def _setup(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    """Return the gradients of the operator's inputs.

    The backward operator returns an empty tensor for an input that is `None`.
    """
    if dy is None:
        return (None,) * 9
    x, delta, A, B, C, D, delta_bias, saved_states = ctx.saved_tensors
    *grads, dD, dbias = torch.ops.zoo.selective_scan_backward(
        dy, x, delta, A, B, C, D, delta_bias, saved_states, ctx.delta_softplus
    )
    dD = None if D is None else dD
    return *grads, dD, None if delta_bias is None else dbias, None, None


register(
    f"selective_scan({_INPUTS}, bool delta_softplus, bool save) -> (Tensor, Tensor)",
    cuda=_cuda,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
register(
    f"selective_scan_backward(Tensor dy, {_INPUTS}, Tensor saved_states, bool delta_softplus)"
    f" -> ({', '.join(['Tensor'] * 7)})",
    cuda=_cuda_backward,
    fake=_fake_backward,
)
