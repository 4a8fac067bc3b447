# ruff: noqa: RUF005 -- Triton compiles no starred tuples
"""A block of tokens through the selective scan, forward and backward: device functions in Triton.

Unrolled over its `T` tokens, so that every state inside the block has a register of its own.
"""

import triton
import triton.language as tl

from zoo.layers.scan_lanes import T, fold, fold_entries, of_owner, shares_of_both, times, turn_of


@triton.jit
def run(
    state, steps, tokens, dealt, decay, skip,
    NP: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A block forward: the state after it, and the outputs at the tokens' owners."""
    inputs = times(steps, tokens, P)
    outs = ()
    for s in tl.static_range(T // P):
        parts = ()
        for r in tl.static_range(P):
            step = of_owner(steps, s * P + r, P)
            u = of_owner(inputs, s * P + r, P)
            b_row, c_row = shares_of_both(dealt, s * P + r, 0, NP, P, KIND)
            out = tl.zeros((32,), tl.float32)
            after = ()
            for j in tl.static_range(NP // P):
                h = tl.exp2(step * decay[j]) * state[j] + u * b_row[j]
                out += h * c_row[j]
                after = after + (h,)
            state = after
            parts = parts + (out,)
        outs = outs + (fold(parts, P, P // 2, 1) + skip * tokens[s].to(tl.float32),)
    return state, outs


@triton.jit
def recompute(
    start, steps, inputs, dealt, decay, turn,
    NP: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The states before, between and after a block's tokens, and the decays between them."""
    states = start
    decays = ()
    for i in tl.static_range(T):
        step = of_owner(steps, i, P)
        u = of_owner(inputs, i, P)
        b_row, _ = shares_of_both(dealt, i, turn, NP, P, KIND)
        for j in tl.static_range(NP // P):
            a = tl.exp2(step * decay[j])
            decays = decays + (a,)
            states = states + (a * states[i * (NP // P) + j] + u * b_row[j],)
    return states, decays


@triton.jit
def turn_back(g, dA, dy, step, u, b_row, c_row, before, after, decays, decay, M: tl.constexpr):
    """One token backward, `g` being what later tokens have to do with the state after it.

    Returns the same for the state before it, the gradient of A so far, this lane's parts of those
    of Δ x and (in units of 1 / ln 2) of Δ, and the channel's parts of those of B and C.
    """
    du = tl.zeros((32,), tl.float32)
    dstep = tl.zeros((32,), tl.float32)
    carried = ()
    dA_so_far = ()
    dB = ()
    dC = ()
    for j in tl.static_range(M):
        total = g[j] + dy * c_row[j]
        dC = dC + (dy * after[j],)
        dB = dB + (total * u,)
        du += total * b_row[j]
        carry = total * decays[j]
        slope = carry * before[j]
        dstep += slope * decay[j]
        dA_so_far = dA_so_far + (dA[j] + slope * step,)
        carried = carried + (carry,)
    return carried, dA_so_far, du, dstep, dB, dC


@triton.jit
def run_back(
    g, dA, start, steps, tokens, dys, dealt, decay,
    NP: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A block backward: gradients of Δ x and Δ at the owners, those of B and C folded.

    All states and what belongs to them are in the order of `turn_of`.
    """
    M: tl.constexpr = NP // P
    turn = turn_of(NP, P)
    inputs = times(steps, tokens, P)
    states, decays = recompute(start, steps, inputs, dealt, decay, turn, NP, P, KIND)
    dus = ()
    dsteps = ()
    folded = ()
    for s in tl.static_range(T // P - 1, -1, -1):
        du_parts = ()
        dstep_parts = ()
        for i in tl.static_range(s * P + P - 1, s * P - 1, -1):
            b_row, c_row = shares_of_both(dealt, i, turn, NP, P, KIND)
            g, dA, du, dstep, dB, dC = turn_back(
                g,
                dA,
                of_owner(dys, i, P),
                of_owner(steps, i, P),
                of_owner(inputs, i, P),
                b_row,
                c_row,
                states[i * M : i * M + M],
                states[i * M + M : i * M + 2 * M],
                decays[i * M : i * M + M],
                decay,
                M,
            )
            du_parts = (du,) + du_parts
            dstep_parts = (dstep,) + dstep_parts
            folded = (fold_entries(dB, dC, NP, P),) + folded
        dus = (fold(du_parts, P, P // 2, 1),) + dus
        dsteps = (fold(dstep_parts, P, P // 2, 1),) + dsteps
    return g, dA, dus, dsteps, folded
