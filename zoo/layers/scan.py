"""The selective scan of Mamba (2312.00752), which every state-space mixer calls.

Tensors are batch first and channels last, and bias and softplus of the step are inside. On a GPU
one operator runs it in Triton kernels (zoo.kernels.scan); everywhere else plain torch does, here.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.kernels import scan as scan_op
from zoo.kernels.available import runs_kernels
from zoo.kernels.scan_shapes import MAX_STATES


def selective_scan(
    x: Float[Tensor, "B L C"],
    delta: Float[Tensor, "B L C"],
    A: Float[Tensor, "C S"],
    B: Float[Tensor, "B L S"],
    C: Float[Tensor, "B L S"],
    D: Float[Tensor, " C"] | None = None,
    *,
    delta_bias: Float[Tensor, " C"] | None = None,
    delta_softplus: bool = False,
    chunk: int | None = None,
) -> Float[Tensor, "B L C"]:
    """Run the linear recurrence of a selective state-space model along the tokens.

    Mamba (2312.00752), one direction, `S` states a channel; all channels share `B` and `C`:

        h_t = exp(Δ_t A) h_(t-1) + Δ_t B_t x_t,    y_t = C_t · h_t + D x_t

    In plain torch, chunks of tokens run side by side and hand their last states on, so L tokens
    take about 3 sqrt(L) serial steps and an exported graph grows with sqrt(L). Every exponent is
    one step's Δ A or a sum of them, never the negative of one: with A <= 0 nothing overflows.
    CUDA tensors of at most 32 bits run in a Triton kernel, in any strides and without a copy.

    Args:
        delta: Step sizes, positive; with `delta_softplus`, softplus(delta + delta_bias) is.
        A: Negative decay rates.
        chunk: Tokens in a chunk; sqrt(L) / 2 if None, the fastest on a CPU within a few percent.
            With a number, plain torch runs whatever the device.

    Returns:
        In the dtype of `x`; computed in float32, or in float64 when that is what `x` is.
    """
    if chunk is None and runs_kernels(x, delta, A, B, C):
        return _scan_in_kernels(x, delta, A, B, C, D, delta_bias, delta_softplus)
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, delta, A, B, C = (t.to(wide) for t in (x, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    length = x.shape[1]
    y = _scan_chunks(x, delta, A.t(), B, C, chunk or math.ceil(math.sqrt(length) / 2))
    if D is not None:
        y = torch.addcmul(y, x, D.to(wide))
    return y.to(dtype)


def _scan_in_kernels(
    x: Float[Tensor, "B L C"],
    delta: Float[Tensor, "B L C"],
    A: Float[Tensor, "C S"],
    B: Float[Tensor, "B L S"],
    C: Float[Tensor, "B L S"],
    D: Float[Tensor, " C"] | None,
    delta_bias: Float[Tensor, " C"] | None,
    delta_softplus: bool,
) -> Float[Tensor, "B L C"]:
    """Run the operator; more states than it takes run in parts, whose outputs add up."""
    tensors = (x, delta, A, B, C, D, delta_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if A.shape[1] <= MAX_STATES:
        return scan_op.scan(*tensors, delta_softplus, save)[0]
    # In float32, so that outputs and gradients of the parts are summed before they are rounded.
    wide, step, y = x.float(), delta.float(), torch.zeros((), device=x.device)
    for first in range(0, A.shape[1], MAX_STATES):
        a, b, c = (t[..., first : first + MAX_STATES] for t in (A, B, C))
        skip = None if first else D
        y = y + scan_op.scan(wide, step, a, b, c, skip, delta_bias, delta_softplus, save)[0]
    return y.to(x.dtype)


def _scan_chunks(
    x: Float[Tensor, "B L C"],
    delta: Float[Tensor, "B L C"],
    A: Float[Tensor, "S C"],
    B: Float[Tensor, "B L S"],
    C: Float[Tensor, "B L S"],
    chunk: int,
) -> Float[Tensor, "B L C"]:
    """Scan from a zero state without the skip; a state is [B chunks S C], channels contiguous."""
    length = x.shape[1]
    pad = -length % chunk  # a token with Δ = 0 leaves the state as it is
    x, delta, B, C = (
        (F.pad(t, (0, 0, 0, pad)) if pad else t).unflatten(1, (-1, chunk)) for t in (x, delta, B, C)
    )
    # unbind, not an index in each step: its backward is one stack instead of many zero-filled sums.
    rows = [t.unsqueeze(3).unbind(2) for t in (delta, delta * x)]
    cols = [t.unsqueeze(4).unbind(2) for t in (B, C)]
    decays = [torch.exp(step * A) for step in rows[0]]
    inputs = [step * b for step, b in zip(rows[1], cols[0], strict=True)]

    # First pass: each chunk from a zero state, for its last state only.
    state = inputs[0]
    for decay, entry in zip(decays[1:], inputs[1:], strict=True):
        state = torch.addcmul(entry, decay, state)
    state = _states_before(state, torch.exp(delta.sum(2).unsqueeze(2) * A))

    # Second pass: each chunk from the state that the chunks before it leave.
    outputs = []
    for decay, entry, c in zip(decays, inputs, cols[1], strict=True):
        state = torch.addcmul(entry, decay, state)
        outputs.append((state * c).sum(2))  # no matmul, which autocast would run in bfloat16
    return torch.stack(outputs, 2).flatten(1, 2)[:, :length]


def _states_before(
    last: Float[Tensor, "B chunks S C"], decay: Float[Tensor, "B chunks S C"]
) -> Float[Tensor, "B chunks S C"]:
    """Compute the state that each chunk starts from, from all chunks' last states and decays."""
    states = [torch.zeros_like(last[:, 0])]
    for entry, factor in zip(last[:, :-1].unbind(1), decay[:, :-1].unbind(1), strict=True):
        states.append(torch.addcmul(entry, factor, states[-1]))
    return torch.stack(states, 1)
