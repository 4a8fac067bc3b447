# ruff: noqa: RUF005, RET505 -- Triton compiles no starred tuples, and both branches of a constant if
"""How the lanes of one warp share a selective scan: device functions in Triton.

`P` neighbouring lanes share a channel and split its `NP` states. What is one number a token, its
step for example, is worked out by one of them in turn, the token's owner, and handed to the
others. B and C, the same for all channels, are dealt out to the lanes a block of `T` tokens at a
time and handed round entry by entry.

A tuple holds one vector of 32 lanes for each owned token (`T // P` of them) or for each of a
lane's states (`NP // P`), so that all of them are registers.
"""

import triton
import triton.language as tl

from zoo.kernels.scan_shapes import BLOCK
from zoo.kernels.sigmoid_triton import INTERPRETED, LOG2E

T = tl.constexpr(BLOCK)


@triton.jit
def softplus(v):
    """log(1 + exp v) = max(v, 0) + e p(e) for e = exp(-|v|), to 3e-7 of itself however small.

    p is the minimax polynomial of log(1 + e) / e on [0, 1]: cheaper than a second operation of
    the exponential unit, which is what bounds the scan.
    """
    e = tl.exp2(tl.abs(v) * -LOG2E)
    p = -0.0085392063 * e + 0.0440896228
    p = p * e - 0.1076816991
    p = p * e + 0.1774524003
    p = p * e - 0.2449546307
    p = p * e + 0.3327547908
    p = p * e - 0.4999740422
    p = p * e + 0.9999998212
    return tl.maximum(v, 0.0) + e * p


@triton.jit
def zeros(COUNT: tl.constexpr):
    """`COUNT` vectors of zeros."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros((32,), tl.float32),)
    return made


@triton.jit
def turn_of(NP: tl.constexpr, P: tl.constexpr):
    """The order of its own that each lane has its states in on the way back: see `fold_entries`."""
    return tl.arange(0, 32) * (NP // P) // 32


@triton.jit
def entry_of(j: tl.constexpr, turn, NP: tl.constexpr, P: tl.constexpr):
    """Which of its channel's states each lane has in register `j`; `turn` is 0 or `turn_of`."""
    return tl.arange(0, 32) % P * (NP // P) + (j ^ turn)


@triton.jit
def turned(state, NP: tl.constexpr, P: tl.constexpr):
    """A state in the order of `turn_of`, from one in that of memory, where it lies side by side."""
    for k in tl.static_range(4):
        if (NP // P) >> k > 1:
            other = tl.arange(0, 32) & (16 >> k) != 0
            after = ()
            for j in tl.static_range(NP // P):
                after = after + (tl.where(other, state[j ^ ((NP // P) >> k) // 2], state[j]),)
            state = after
    return state


@triton.jit
def find_channel(
    A, D, bias, chs, turn,
    N: tl.constexpr, NP: tl.constexpr, P: tl.constexpr, W: tl.constexpr, k: tl.constexpr,
):  # fmt: skip
    """Channel `k` of this lane's `W`, kept in range too, its decay rates to base 2, skip and bias.

    Lanes beyond the last channel work on the last one, and what they find is not stored.
    """
    lane = tl.arange(0, 32)
    channel = (tl.program_id(0) * (32 // P) + lane // P) * W + k
    c = tl.minimum(channel, chs - W + k)
    decay = ()
    for j in tl.static_range(NP // P):
        n = entry_of(j, turn, NP, P)
        decay = decay + (tl.load(A + c * N + n, mask=n < N, other=0.0) * LOG2E,)
    skip = tl.zeros((32,), tl.float32)
    if D is not None:
        skip = tl.load(D + c).to(tl.float32)
    shift = tl.zeros((32,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + c).to(tl.float32)
    return channel, c, decay, skip, shift


@triton.jit
def start_of(sequence, b, first):
    """The token `first` of sequence `b`: a place, and the strides of tokens and channels in bytes.

    `sequence` is a (tensor, strides) of batch, tokens and channels. The place is the same for all
    lanes and moves from block to block, so that a lane's offsets from it never change.
    """
    place = sequence[0] + b * sequence[1] + first.to(tl.int64) * sequence[2]
    size: tl.constexpr = place.dtype.element_ty.primitive_bitwidth // 8
    return (place, sequence[2] * size, sequence[3] * size)


@triton.jit
def moved(at, tokens):
    """`at` so many tokens on."""
    byte = at[0].to(tl.pointer_type(tl.uint8), bitcast=True) + tokens * at[1]
    return (byte.to(at[0].dtype, bitcast=True), at[1], at[2])


@triton.jit
def bytes_beyond(place, offset):
    """`offset` bytes, not negative, after a common `place`.

    In 32 bits without a sign: the upper half of what is added is then zero and takes no register,
    of which the kernels have none to spare.
    """
    byte = place.to(tl.pointer_type(tl.uint8), bitcast=True) + offset.to(tl.uint32)
    return byte.to(place.dtype, bitcast=True)


@triton.jit
def beyond(place, offset):
    """`offset` numbers, not negative, after a common `place`."""
    return bytes_beyond(place, offset * (place.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def placed(at, token, column, left):
    """`column` of a token of the block at `at`: of the last one, if there are only `left` of them.

    `left` is None where the block is sure to be whole.
    """
    offset = token * at[1] + column * at[2]
    if left is None:
        return bytes_beyond(at[0], offset)
    else:
        return bytes_beyond(at[0], tl.minimum(offset, (left - 1) * at[1] + column * at[2]))


@triton.jit
def load_word(place):
    """A number of 16 bits as the lower half of a word, any other as it is.

    Registers of 16 bits are copied where the passes of a loop meet, which waits for the load.
    """
    x = tl.load(place)
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        return x


@triton.jit
def load_tokens(at, c, left, P: tl.constexpr):
    """Words of the block at `at`, the last token's in place of those of tokens not there."""
    words = ()
    for s in tl.static_range(T // P):
        words = words + (load_word(placed(at, s * P + tl.arange(0, 32) % P, c, left)),)
    return words


@triton.jit
def of_pairs(at, W: tl.constexpr):
    """`at`, read `W` channels at a time: two of 16 bits make a word."""
    if W == 2:
        return (at[0].to(tl.pointer_type(tl.int32), bitcast=True), at[1], at[2])
    else:
        return at


@triton.jit
def halves(word, KIND: tl.constexpr):
    """The two numbers of dtype `KIND` in a word, in float32."""
    if KIND.is_bf16():  # the upper half of a float32
        low = (word << 16).to(tl.float32, bitcast=True)
        return low, (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def in_float32(words, KIND: tl.constexpr, half: tl.constexpr = 0):
    """The numbers of dtype `KIND` in what was loaded, from the lower or the upper half of words."""
    numbers = ()
    for s in tl.static_range(len(words)):
        if KIND.is_fp32():
            numbers = numbers + (words[s],)
        else:
            numbers = numbers + (halves(words[s], KIND)[half],)
    return numbers


@triton.jit
def rounded(low, high, KIND: tl.constexpr):
    """Two float32 in a word, as dtype `KIND`: one instruction, which Triton does not find."""
    if INTERPRETED:
        upper = high.to(KIND).to(tl.uint16, bitcast=True).to(tl.int32) << 16
        return upper | low.to(KIND).to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        CODE: tl.constexpr = "bf16x2" if KIND.is_bf16() else "f16x2"
        return tl.inline_asm_elementwise(
            "cvt.rn." + CODE + ".f32 $0, $2, $1;", "=r,r,r", [low, high], tl.int32, True, 1
        )


@triton.jit
def inside(s: tl.constexpr, channel, left, chs, P: tl.constexpr):
    """Whether there is such a channel, and the owned token `s` among the `left` ones, or all."""
    if left is None:
        return channel < chs
    else:
        return s * P + tl.arange(0, 32) % P < tl.where(channel < chs, left, 0)


@triton.jit
def kept_inside(tokens, channel, left, chs, P: tl.constexpr):
    """The owned tokens, zeros beyond the last token and the last channel."""
    kept = ()
    for s in tl.static_range(T // P):
        there = inside(s, channel, left, chs, P)
        kept = kept + (tl.where(there, tokens[s], 0.0),)
    return kept


@triton.jit
def find_steps(raw, shift, P: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The owned tokens' step sizes."""
    steps = ()
    for s in tl.static_range(T // P):
        step = raw[s] + shift
        if SOFTPLUS:
            step = softplus(step)
        steps = steps + (step,)
    return steps


@triton.jit
def times(steps, tokens, P: tl.constexpr):
    """The owned tokens' inputs Δ x."""
    inputs = ()
    for s in tl.static_range(T // P):
        inputs = inputs + (steps[s] * tokens[s],)
    return inputs


@triton.jit
def of_owner(owned, i: tl.constexpr, P: tl.constexpr):
    """What the owner of token `i` has for it, in all lanes of the channel."""
    lane = tl.arange(0, 32)
    return tl.gather(owned[i // P], lane - lane % P + i % P, 0)


@triton.jit
def deal(at, left, N: tl.constexpr, NP: tl.constexpr):
    """Words of the block's rows of B or C, dealt out to the lanes; zeros from entry `N` on."""
    dealt = ()
    for k in tl.static_range(T * NP // 32):
        e = k * 32 + tl.arange(0, 32)
        word = load_word(placed(at, e // NP, tl.minimum(e % NP, N - 1), left))
        dealt = dealt + (word if N == NP else tl.where(e % NP < N, word, 0),)
    return dealt


@triton.jit
def deal_both(B, C, left, N: tl.constexpr, NP: tl.constexpr):
    """B and C dealt out, one after the other."""
    return deal(B, left, N, NP) + deal(C, left, N, NP)


@triton.jit
def paired(dealt, KIND: tl.constexpr):
    """What `deal_both` gave; two entries of 16 bits share a word: half the shuffles later on."""
    COUNT: tl.constexpr = len(dealt) // 2
    words = ()
    if KIND.is_fp32():
        words = dealt
    else:
        for k in tl.static_range(COUNT):
            words = words + (dealt[k] | (dealt[COUNT + k] << 16),)
    return words


@triton.jit
def share_of(dealt, i: tl.constexpr, turn, NP: tl.constexpr, P: tl.constexpr):
    """This lane's share of the dealt entries of token `i`."""
    share = ()
    for j in tl.static_range(NP // P):
        place = (i * NP) % 32 + entry_of(j, turn, NP, P)
        share = share + (tl.gather(dealt[(i * NP) // 32], place, 0),)
    return share


@triton.jit
def shares_of_both(
    dealt, i: tl.constexpr, turn, NP: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr
):
    """This lane's shares of token `i`'s rows of B and C (of dtype `KIND`), in float32."""
    if KIND.is_fp32():
        return share_of(dealt, i, turn, NP, P), share_of(dealt, i + T, turn, NP, P)
    else:
        words = share_of(dealt, i, turn, NP, P)
        b_row = ()
        c_row = ()
        for j in tl.static_range(NP // P):
            low, high = halves(words[j], KIND)
            b_row = b_row + (low,)
            c_row = c_row + (high,)
        return b_row, c_row


@triton.jit
def fold(values, COUNT: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr):
    """Sum each of `COUNT` vectors over the lanes whose numbers differ from bit `TOP` to `LOW`.

    At each bit a lane sends half of the values that it still carries, and adds to the other half
    what it receives. The top bits of its number say which value's sum it ends with.
    """
    lane = tl.arange(0, 32)
    for k in tl.static_range(5):
        if (TOP >> k) >= LOW:
            folded = ()
            if (COUNT >> k) > 1:
                upper = (lane & (TOP >> k)) != 0
                for j in tl.static_range((COUNT >> k) // 2):
                    low = values[j]
                    high = values[j + (COUNT >> k) // 2]
                    sent = tl.where(upper, low, high)
                    kept = tl.where(upper, high, low)
                    folded = folded + (kept + tl.gather(sent, lane ^ (TOP >> k), 0),)
            else:
                folded = (values[0] + tl.gather(values[0], lane ^ (TOP >> k), 0),)
            values = folded
    return values[0]


@triton.jit
def fold_entries(dB, dC, NP: tl.constexpr, P: tl.constexpr):
    """Sum a token's gradients of B and C, one vector for each of a lane's states, over channels.

    At each of the top bits of its number a lane gives away the upper half of its registers. In the
    order of `turn_of`, which follows those bits, they are what the lane across keeps, so that no
    lane selects. The next bit says whether a lane ends with a sum of B's or of C's.
    """
    lane = tl.arange(0, 32)
    M: tl.constexpr = NP // P
    for k in tl.static_range(4):
        if (M >> k) > 1:
            half_B = ()
            half_C = ()
            for j in tl.static_range((M >> k) // 2):
                across = lane ^ (16 >> k)
                half_B = half_B + (dB[j] + tl.gather(dB[j + (M >> k) // 2], across, 0),)
                half_C = half_C + (dC[j] + tl.gather(dC[j + (M >> k) // 2], across, 0),)
            dB = half_B
            dC = half_C
    return fold((dB[0], dC[0]), 2, 16 // M, P)


@triton.jit
def load_states(rows, c, chs, turn, NP: tl.constexpr, P: tl.constexpr):
    """This lane's share of a state that is stored a row an entry."""
    state = ()
    for j in tl.static_range(NP // P):
        state = state + (tl.load(beyond(rows, entry_of(j, turn, NP, P) * chs + c)),)
    return state


@triton.jit
def store_states(rows, state, channel, chs, turn, NP: tl.constexpr, P: tl.constexpr):
    """Store this lane's share of a state, a row an entry."""
    for j in tl.static_range(NP // P):
        place = beyond(rows, entry_of(j, turn, NP, P) * chs + channel)
        tl.store(place, state[j], mask=channel < chs)


@triton.jit
def store_all_states(rows, state, lanes, chs, NP: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """Store the states of a lane's `W` channels."""
    for k in tl.static_range(W):
        store_states(rows, state[k], lanes[k][0], chs, 0, NP, P)


@triton.jit
def store_tokens(place, tokens, channel, left, chs, P: tl.constexpr):
    """Store the owned tokens of the block at `place`, which lies in [tokens, channels]."""
    for s in tl.static_range(T // P):
        offset = (s * P + tl.arange(0, 32) % P) * chs + channel
        y = tokens[s].to(place.dtype.element_ty)
        tl.store(beyond(place, offset), y, mask=inside(s, channel, left, chs, P))


@triton.jit
def store_all(place, tokens, channel, left, chs, P: tl.constexpr, W: tl.constexpr):
    """Store the owned tokens of each of a lane's `W` channels, of which `channel` is the first."""
    if W == 2:
        KIND: tl.constexpr = place.dtype.element_ty
        words = place.to(tl.pointer_type(tl.int32), bitcast=True)
        for s in tl.static_range(T // P):
            word = rounded(tokens[0][s], tokens[1][s], KIND)
            offset = ((s * P + tl.arange(0, 32) % P) * chs + channel) * 2
            tl.store(bytes_beyond(words, offset), word, mask=inside(s, channel, left, chs, P))
    else:
        store_tokens(place, tokens[0], channel, left, chs, P)


@triton.jit
def store_folded(place, folded, left, NP: tl.constexpr, P: tl.constexpr):
    """Store what `fold_entries` left of a block's gradients, B's and C's side by side a token."""
    lane = tl.arange(0, 32)
    M: tl.constexpr = NP // P
    column = lane // (16 // M) % 2 * NP + entry_of(0, turn_of(NP, P), NP, P)
    twin = lane % (16 // M) // P  # more lanes may have ended with the same sum
    for i in tl.static_range(T):
        row = beyond(place, i * 2 * NP + column)
        tl.store(row, folded[i], mask=twin < tl.where(i < left, 1, 0))
