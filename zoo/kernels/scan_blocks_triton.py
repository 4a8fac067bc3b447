# ruff: noqa: RUF005 -- Triton compiles no starred tuples
"""A block of tokens through the selective scan, forward and backward: device functions in Triton.

Unrolled over its `T` tokens, so that every state inside the block has a register of its own.
"""

import triton
import triton.language as tl

from zoo.kernels.scan_lanes_triton import (
    T,
    find_steps,
    fold,
    fold_entries,
    in_float32,
    of_owner,
    paired,
    shares_of_both,
    times,
    turn_of,
)


@triton.jit
def run(
    state, block, lanes, left,
    NP: tl.constexpr, P: tl.constexpr, W: tl.constexpr, SOFTPLUS: tl.constexpr,
    PAIRED: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """A block forward: the state after it, and the outputs at the tokens' owners.

    Both have an item for each of a lane's `W` channels, of which `lanes` holds what `find_channel`
    gave. The block is words of x, Δ and B with C, of dtypes `KINDS`; `left` is None if it is whole.
    """
    tokens, raw, dealt = block
    KIND: tl.constexpr = KINDS[2] if PAIRED else tl.float32
    dealt = paired(dealt, KIND) if PAIRED else in_float32(dealt, KINDS[2])
    xs = ()
    steps = ()
    inputs = ()
    outs = ()
    for k in tl.static_range(W):
        _, _, _, _, shift = lanes[k]
        xs = xs + (in_float32(tokens, KINDS[0], k),)
        steps = steps + (find_steps(in_float32(raw, KINDS[1], k), shift, P, SOFTPLUS),)
        inputs = inputs + (times(steps[k], xs[k], P),)
        outs = outs + ((),)
    for s in tl.static_range(T // P):
        some = ()
        for _ in tl.static_range(W):
            some = some + (tl.zeros((32,), tl.float32),)
        if left is None:  # noqa: SIM114 -- Triton decides this one when it compiles
            state, some = run_some(state, steps, inputs, xs, dealt, lanes, s, NP, P, W, KIND)
        elif s * P < left:
            state, some = run_some(state, steps, inputs, xs, dealt, lanes, s, NP, P, W, KIND)
        longer = ()
        for k in tl.static_range(W):
            longer = longer + (outs[k] + (some[k],),)
        outs = longer
    return state, outs


@triton.jit
def run_some(
    state, steps, inputs, xs, dealt, lanes, s: tl.constexpr,
    NP: tl.constexpr, P: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The `P` tokens of a block that are their owners' number `s`: the state and the outputs."""
    parts = ()
    for r in tl.static_range(P):
        b_row, c_row = shares_of_both(dealt, s * P + r, 0, NP, P, KIND)
        states = ()
        for k in tl.static_range(W):
            _, _, decay, _, _ = lanes[k]
            step = of_owner(steps[k], s * P + r, P)
            u = of_owner(inputs[k], s * P + r, P)
            out = tl.zeros((32,), tl.float32)
            after = ()
            for j in tl.static_range(NP // P):
                h = tl.exp2(step * decay[j]) * state[k][j] + u * b_row[j]
                out += h * c_row[j]
                after = after + (h,)
            states = states + (after,)
            parts = parts + (out,)
        state = states
    outs = ()
    for k in tl.static_range(W):
        of_channel = ()
        for r in tl.static_range(P):
            of_channel = of_channel + (parts[r * W + k],)
        _, _, _, skip, _ = lanes[k]
        outs = outs + (fold(of_channel, P, P // 2, 1) + skip * xs[k][s],)
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
    dealt = paired(dealt, KIND)
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
