"""Experts over ranks beside one process that has all of them, in float64."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from on_ranks import refused

from zoo.language.expert_parallel import folded_meshes, run_experts
from zoo.language.moe import Routing
from zoo.layers.sequence import even_lengths, split_tokens, ulysses_attention

TOKENS, DIM, EXPERTS, TOP = 22, 6, 8, 2


def mlp(up, down):
    """Each row through its own expert."""
    return lambda x, e: torch.einsum(
        "mfc,mc->mf", down[e], F.silu(torch.einsum("mfc,mc->mf", up[e], x))
    )


def route(logits):
    weights, experts = logits.softmax(-1).topk(TOP)
    return Routing(weights / weights.sum(-1, keepdim=True), experts)


def reference(x, router, up, down, capacity=None):
    """Every expert in turn, without any sorting; also how many pairs had no room."""
    weights, experts = route(x @ router.T)
    out, dropped = torch.zeros_like(x), 0
    room = len(x) * TOP if capacity is None else -(-int(capacity * len(x) * TOP) // EXPERTS)
    for e in range(EXPERTS):
        tokens, slots = torch.where(experts == e)
        dropped += max(0, len(tokens) - room)
        tokens, slots = tokens[:room], slots[:room]
        y = mlp(up, down)(x[tokens], torch.full_like(tokens, e))
        out = out.index_add(0, tokens, y * weights[tokens, slots, None])
    return out, dropped


def parameters(spoiled: bool):
    """Weights; with `spoiled`, a router that gives the last quarter of the experts no token."""
    router = torch.randn(EXPERTS, DIM).double()
    if spoiled:
        router[-EXPERTS // 4 :] = -torch.full((DIM,), 9.0).double()
    up, down = torch.randn(EXPERTS, 5, DIM).double(), torch.randn(EXPERTS, DIM, 5).double()
    return [t.requires_grad_() for t in (router, up, down)]


def compare(group, capacity=None, spoiled=False, empty=False):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    lengths = list(even_lengths(TOKENS, group))
    if empty and world > 1:
        lengths[0], lengths[-1] = lengths[0] + lengths[-1], 0
    x = torch.rand(TOKENS, DIM).double().requires_grad_()
    weights = parameters(spoiled)
    whole, dropped = reference(x, *weights, capacity)
    look = torch.randn_like(whole)
    wanted = torch.autograd.grad((whole * look).sum(), [x, *weights])

    cut = partial(split_tokens, lengths=lengths, group=group, dim=0)
    mine, router = cut(x).detach().requires_grad_(), weights[0]
    own = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    up, down = (w.detach()[own].requires_grad_() for w in weights[1:])
    routing = route(mine @ router.T)
    if spoiled:
        count = torch.bincount(routing.experts.flatten(), minlength=EXPERTS)
        assert not count[-EXPERTS // 4 :].any()
    ours = run_experts(mine, routing, mlp(up, down), EXPERTS, group, capacity=capacity)
    assert ours.dropped == dropped, (ours.dropped, dropped)
    assert (dropped > 0) == (capacity is not None and capacity < 2)
    leaves = [mine, router, up, down]
    found = torch.autograd.grad((ours.out * cut(look)).sum(), leaves)
    dist.all_reduce(found[1], group=group)
    gaps = [ours.out - cut(whole), found[0] - cut(wanted[0]), found[1] - wanted[1]]
    gaps += [found[2] - wanted[2][own], found[3] - wanted[3][own]]
    return max((gap.abs().max().item() for gap in gaps if gap.numel()), default=0.0)


def case_dropless(group):
    return compare(group)


def case_a_rank_whose_experts_get_no_token(group):
    return compare(group, spoiled=True)


def case_a_rank_without_tokens(group):
    return compare(group, empty=True)


def case_dropping_counts_what_it_drops(group):
    return compare(group, capacity=0.75)


def case_room_enough_drops_nothing(group):
    return compare(group, capacity=float(EXPERTS))


def case_folded_meshes(group):
    """A layer with attention over a sequence mesh and experts over another: as on one process."""
    world = dist.get_world_size(group)
    sequence, experts = (2, world) if world > 2 else (1, world)
    meshes = folded_meshes(torch.get_default_device().type, sequence=sequence, experts=experts)
    cp, ep = meshes.dense["cp"].get_group(), meshes.moe["ep"].get_group()
    rows, rank = world // sequence, dist.get_rank(group)
    x = torch.rand(rows, 2, 11, DIM // 2).double().requires_grad_()  # [B heads T D]
    weights = parameters(False)
    attend = partial(F.scaled_dot_product_attention, is_causal=True)

    mixed = attend(x, x, x).transpose(1, 2).flatten(2)
    whole = reference(mixed.flatten(0, 1), *weights)[0].view_as(mixed)
    look = torch.randn_like(whole)
    wanted = torch.autograd.grad((whole * look).sum(), [x, *weights])

    row, lengths = rank // sequence, even_lengths(11, cp)
    own = slice(*(r * EXPERTS // experts for r in (rank % experts, rank % experts + 1)))
    mine = split_tokens(x[row : row + 1], lengths, cp, dim=2).detach().requires_grad_()
    router = weights[0]
    up, down = (w.detach()[own].requires_grad_() for w in weights[1:])
    q = ulysses_attention(mine, mine, mine, lengths, cp, attend=attend).transpose(1, 2).flatten(2)
    tokens = q.flatten(0, 1)
    routing = route(tokens @ router.T)
    out = run_experts(tokens, Routing(*routing), mlp(up, down), EXPERTS, ep).out.view_as(q)
    target = split_tokens(look[row : row + 1], lengths, cp)
    found = list(torch.autograd.grad((out * target).sum(), [mine, router, up, down]))
    dist.all_reduce(found[1], group=group)
    copies = meshes.moe["edp"].get_group()
    for grad in found[2:]:
        dist.all_reduce(grad, group=copies)
    gaps = [out - split_tokens(whole[row : row + 1], lengths, cp), found[1] - wanted[1]]
    gaps += [found[0] - split_tokens(wanted[0][row : row + 1], lengths, cp, dim=2)]
    gaps += [found[2] - wanted[2][own], found[3] - wanted[3][own]]
    return max(gap.abs().max().item() for gap in gaps)


def case_refusals(group):
    world = dist.get_world_size(group)
    x = torch.rand(3, DIM)
    routing = route(torch.rand(3, 8))
    odd = (lambda: run_experts(x, routing, mlp(x, x), 8 * world + 1, group), "nearest number is")
    calls = (
        *([odd] if world > 1 else ()),  # one rank takes any number
        (lambda: run_experts(x, routing, mlp(x, x), 8, group, capacity=0), "above 0"),
        (lambda: folded_meshes("cpu", experts=world + 1), f"nearest size is {world}"),
    )
    refused(calls)
    return 0.0
