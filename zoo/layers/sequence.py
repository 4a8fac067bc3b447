"""Long sequences over several ranks: each holds a stretch of the tokens, and all of the weights.

Attention changes from tokens to heads and back (Ulysses, 2309.14509): each rank sees every token
for its share of the heads, so any attention and any mask runs there as on one process. A recurrence
hands its state on from rank to rank, a short convolution the last tokens before a stretch.

Every function takes its process group, with `None` for one process, and `lengths`: how many tokens
each rank of the group holds, in their order, none among them. All ranks call the same functions in
the same order, and let gradients flow through all of them or through none.

Gradients are those of the sum of all ranks' losses. So each rank takes the loss of its own tokens,
and gradients of weights are to be added up over the ranks; a loss that every rank computes of
gathered tokens counts once for each of them.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Group = dist.ProcessGroup | None


def even_lengths(num_tokens: int, group: Group) -> tuple[int, ...]:
    """Return how many tokens each rank gets: equally many, the first ones one more if need be."""
    share, rest = divmod(num_tokens, world(group))
    return tuple(share + (rank < rest) for rank in range(world(group)))


def split_tokens(x: Tensor, lengths: Sequence[int], group: Group, *, dim: int = 1) -> Tensor:
    """Return this rank's stretch of a tensor that every rank holds whole.

    Raises:
        ValueError: `lengths` are not of this group, or do not add up to the tokens.
    """
    rank = _rank(lengths, group)
    if sum(lengths) != x.shape[dim]:
        raise ValueError(f"{x.shape[dim]} tokens do not split into {list(lengths)}.")
    return x.narrow(dim, sum(lengths[:rank]), lengths[rank])


def gather_tokens(x: Tensor, lengths: Sequence[int], group: Group, *, dim: int = 1) -> Tensor:
    """Return the whole of a tensor of which each rank holds its stretch, on every rank.

    Raises:
        ValueError: `lengths` are not those of the ranks.
    """
    _check_length(x, lengths, group, dim)
    shapes = [(*x.shape[:dim], length, *x.shape[dim:][1:]) for length in lengths]
    found = exchange([[x]] * len(lengths), [[shape] for shape in shapes], group)
    return torch.cat([stretch for [stretch] in found], dim)


def over_heads(
    operator: Callable[..., Float[Tensor, "B h T D"]],
    inputs: Sequence[Float[Tensor, "B _ t _"]],
    lengths: Sequence[int],
    group: Group,
) -> Float[Tensor, "B H t D"]:
    """Run an operator that treats heads alike: on all tokens of this rank's share of the heads.

    Channels of a filter may be the heads, with D = 1. There are two transfers, in which a rank
    sends and receives (W - 1) / W of what it holds of inputs and output.

    Args:
        operator: Takes the inputs with fewer heads and all tokens, and returns as many heads as the
            first of them has.
        inputs: Each with a number of heads that the number of ranks divides.

    Raises:
        ValueError: heads do not split over the ranks, or `lengths` are not those of the ranks.
    """
    num_ranks, rank = len(lengths), _rank(lengths, group)
    for x in inputs:
        _check_length(x, lengths, group, 2)
        if x.shape[1] % num_ranks:
            raise ValueError(_no_split(num_ranks, x.shape[1]))
    parts = [x.chunk(num_ranks, dim=1) for x in inputs]
    shapes = [[(*part[0].shape[:2], t, part[0].shape[3]) for part in parts] for t in lengths]
    found = exchange(list(zip(*parts, strict=True)), shapes, group)
    out = operator(*(torch.cat(stretches, dim=2) for stretches in zip(*found, strict=True)))
    shape = (*out.shape[:2], lengths[rank], out.shape[3])
    back = exchange([[x] for x in out.split(list(lengths), dim=2)], [[shape]] * num_ranks, group)
    return torch.cat([heads for [heads] in back], dim=1)


def ulysses_attention(
    q: Float[Tensor, "B H t D"],
    k: Float[Tensor, "B K t D"],
    v: Float[Tensor, "B K t V"],
    lengths: Sequence[int],
    group: Group,
    *,
    attend: Callable[..., Float[Tensor, "B h T V"]] = F.scaled_dot_product_attention,
) -> Float[Tensor, "B H t V"]:
    """Attend from this rank's tokens to all ranks' tokens (Ulysses, 2309.14509).

    With fewer heads of keys than ranks (grouped queries), each is sent to the ranks whose queries
    share it.

    Args:
        attend: Takes q, k and v of some heads and all tokens, keys repeated so that there are as
            many as queries; bind masks and causality to it: `partial(..., is_causal=True)`.

    Raises:
        ValueError: queries or keys do not split over the ranks.
    """
    num_ranks = len(lengths)
    copies = key_copies(q.shape[1], k.shape[1], num_ranks)
    k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = q.shape[1] // k.shape[1]
        return attend(q, k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1))

    return over_heads(grouped, (q, k, v), lengths, group)


def key_copies(num_heads: int, num_key_heads: int, num_ranks: int) -> int:
    """Return how many ranks need each head of keys; 1 if each rank has some of its own.

    Raises:
        ValueError: heads of queries do not split over the ranks, or neither do heads of keys over
            ranks nor ranks over heads of keys.
    """
    if num_heads % num_ranks or (num_key_heads % num_ranks and num_ranks % num_key_heads):
        raise ValueError(_no_split(num_ranks, num_heads, num_key_heads))
    return max(1, num_ranks // num_key_heads)


def _no_split(num_ranks: int, num_heads: int, num_key_heads: int | None = None) -> str:
    keys = num_key_heads or num_heads
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    fits = [n for n in divisors if keys % n == 0 or n % keys == 0]
    near = min(fits, key=lambda n: abs(n - num_ranks))
    of_keys = "" if keys == num_heads else f" with {keys} of keys"
    return (
        f"{num_heads} heads{of_keys} do not split over {num_ranks} ranks; "
        f"the nearest number of ranks that they do over is {near}."
    )


def states_before(
    state: Float[Tensor, "*state"], decay: Float[Tensor, "*decay"], group: Group
) -> Float[Tensor, "*state"]:
    """Return the state in which a linear recurrence reaches this rank's first token.

    The exclusive scan over ranks of h -> a h + b, which is what all of h_t = a_t h_(t-1) + b_t over
    a rank's stretch does to the state before it:

        h_0 = 0,    h_(r+1) = a_r h_r + b_r

    In one transfer, each rank hears from all before it: the last of W ranks receives W - 1 states.

    Args:
        state: b: the last state of this rank's stretch, begun at zero.
        decay: a: the product of its decays; of any shape that broadcasts to the state's.
    """
    if group is None:
        return torch.zeros_like(state)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    nothing = [state.flatten()[:0], decay.flatten()[:0]]
    sent = [[state, decay] if rank < other else nothing for other in range(num_ranks)]
    full, empty = [state.shape, decay.shape], [(0,), (0,)]
    found = exchange(sent, [full if other < rank else empty for other in range(num_ranks)], group)
    before = torch.zeros_like(state)
    for b, a in found[:rank]:
        before = torch.addcmul(b, a, before)
    # An empty sum, so that the backward pass of each rank, the first among them, takes part.
    return before + sum(b.sum() + a.sum() for b, a in found[rank:])


def tokens_before(
    x: Tensor, count: int, lengths: Sequence[int], group: Group, *, dim: int = 1
) -> Tensor:
    """Return the last tokens before this rank's stretch, from as many ranks as hold them.

    Args:
        count: How many; zeros stand where the sequence has not begun.

    Raises:
        ValueError: `lengths` are not those of the ranks.
    """
    rank = _check_length(x, lengths, group, dim)
    begins = [sum(lengths[:r]) for r in range(len(lengths) + 1)]

    def shared(source: int, target: int) -> tuple[int, int]:
        """Return where the source's tokens that the target wants begin, and how many there are."""
        begin = max(begins[source], begins[target] - count)
        end = min(begins[source + 1], begins[target])
        return min(begin, end) - begins[source], max(0, end - begin)

    def shape(length: int) -> tuple[int, ...]:
        return (*x.shape[:dim], length, *x.shape[dim:][1:])

    everyone = range(len(lengths))
    sent = [[x.narrow(dim, *_inside(shared(rank, r), lengths[rank]))] for r in everyone]
    found = exchange(sent, [[shape(shared(r, rank)[1])] for r in everyone], group)
    missing = count - sum(tokens.shape[dim] for [tokens] in found)
    return torch.cat([x.new_zeros(shape(missing)), *(tokens for [tokens] in found)], dim)


def _inside(stretch: tuple[int, int], length: int) -> tuple[int, int]:
    """Keep the beginning of an empty stretch within the tokens."""
    begin, count = stretch
    return min(max(begin, 0), length), count


def causal_conv(
    x: Float[Tensor, "B t C"],
    weight: Float[Tensor, "C K"],
    bias: Float[Tensor, " C"] | None,
    lengths: Sequence[int],
    group: Group,
) -> Float[Tensor, "B t C"]:
    """Convolve each channel with its own short filter, whose last weight meets the present token.

    Raises:
        ValueError: `lengths` are not those of the ranks.
    """
    before = tokens_before(x, weight.shape[1] - 1, lengths, group)
    # One token more, whose output is dropped: torch's convolution refuses an output of no tokens.
    inputs = F.pad(torch.cat([before, x], dim=1), (0, 0, 1, 0)).transpose(1, 2)
    return F.conv1d(inputs, weight[:, None], bias, groups=x.shape[2])[:, :, 1:].transpose(1, 2)


def exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], group: Group
) -> list[list[Tensor]]:
    """Send each rank its own tensors and receive each rank's, all in one uneven transfer.

    Args:
        sent: For each rank of the group what it gets; all of one dtype. Empty tensors are allowed.
        shapes: For each rank the shapes of what it sends here; nothing else tells.
    """
    if group is None:
        return [list(tensors) for tensors in sent]
    flat = torch.cat([x.flatten() for tensors in sent for x in tensors])
    sizes = [sum(x.numel() for x in tensors) for tensors in sent]
    counts = [[prod(shape) for shape in each] for each in shapes]
    out: Any = _AllToAll.apply(flat, sizes, [sum(each) for each in counts], group)
    pieces = iter(out.split([n for each in counts for n in each]))
    return [[next(pieces).view(*shape) for shape in each] for each in shapes]


class _AllToAll(torch.autograd.Function):
    """Numbers of one dim to the ranks and back; its adjoint is the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], counts: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.counts, ctx.group = sizes, counts, group
        out = x.new_empty(sum(counts))
        dist.all_to_all_single(out, x, counts, sizes, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].contiguous()
        return _AllToAll.apply(grad, ctx.counts, ctx.sizes, ctx.group), None, None, None


def world(group: Group) -> int:
    """Return the number of ranks of a group; 1 for `None`."""
    return 1 if group is None else dist.get_world_size(group)


def _rank(lengths: Sequence[int], group: Group) -> int:
    if len(lengths) != world(group):
        raise ValueError(f"There are {len(lengths)} lengths for {world(group)} ranks.")
    return 0 if group is None else dist.get_rank(group)


def _check_length(x: Tensor, lengths: Sequence[int], group: Group, dim: int) -> int:
    rank = _rank(lengths, group)
    if x.shape[dim] != lengths[rank]:
        raise ValueError(
            f"Rank {rank} holds {x.shape[dim]} tokens, and lengths say {lengths[rank]}."
        )
    return rank
