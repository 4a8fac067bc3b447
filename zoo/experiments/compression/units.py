"""Which heads and channels of the SSM stay: scores, choices inside groups and across, the cuts."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.axes import Axis, named_shapes
from zoo.data.plan import mix
from zoo.experiments.compression.hybrid import mamba_mixers
from zoo.language.tokens import Tokens, read_tokens
from zoo.students.prune import score
from zoo.students.prune.library import Parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import prune
from zoo.students.prune.taps import Tap, Taps, alone
from zoo.train.distill.token_losses import cross_entropy
from zoo.train.distill.token_task import flat

Scores = dict[str, dict[str, Tensor]]
"""Kind of score -> mixer -> [H P], or [H] where it is of heads alone."""

HEADS = ("contribution", "contribution_global", "x", "x_global", "leave_one_out", "first")
"""Ways to choose heads: by a score inside each group, or naively across groups; the first ones.
`random_0`, `random_1`, ... are draws inside each group."""
CHANNELS = ("x_shared", "x_per_head", "contribution_shared", "contribution_per_head", "random_0")
"""Ways to choose channels: the same ones in all heads (Minitron-SSM, 2504.11409), or each head its
own. `random_0` draws for each head."""


@torch.no_grad()
def score_units(model: Any, batches: Sequence[Tensor]) -> tuple[Scores, dict[str, Tensor]]:
    """Score the channels of all SSM heads of a hybrid, which runs its modules.

    `x` is the L2 over rows of the mean over tokens of |x|, the SSM's part of what `in_proj`
    returns (2504.11409); `contribution` the same of what `out_proj` takes, times the norm of its
    column.

    Args:
        batches: Ids [B T].

    Returns:
        The scores, and those of all columns that a width can be cut by (`score.activation`).
    """
    shapes, mixers = named_shapes(model), mamba_mixers(model)
    inputs = [dict(input_ids=ids) for ids in batches]
    seen = Taps(model, [Tap(f"{name}.in_proj.weight", 0, lambda out: out) for name in mixers])
    seen.run(model, inputs)
    rows = seen.scores(alone)
    columns = score.activation(model, shapes, inputs, shapes.sizes)
    columns = score.contribution(columns, shapes, model.state_dict())
    found: Scores = {"x": {}, "contribution": {}}
    for name, mixer in mixers.items():
        inner = mixer.intermediate_size  # z | x | B | C | dt
        x = rows[f"{name}.in_proj.weight"][inner : 2 * inner]
        found["x"][name] = x.view(mixer.num_heads, -1)
        found["contribution"][name] = columns[f"{name}.out_proj.weight"].view(mixer.num_heads, -1)
    return found, columns


@torch.no_grad()
def leave_one_out(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return how much the loss on some rows, [B T], rises without each SSM head, [H]."""
    tokens = Tokens(ids, torch.zeros_like(ids))
    counted = tokens.counted.flatten()

    def loss() -> Tensor:
        last, head = flat(read_tokens(model, tokens))
        return cross_entropy(last, head, tokens.following.flatten(), counted, chunk=len(last))

    whole, found = loss(), {}
    for name, mixer in mamba_mixers(model).items():
        weight, rises = mixer.out_proj.weight, []
        for columns in weight.view(len(weight), mixer.num_heads, -1).unbind(1):
            kept = columns.clone()
            columns.zero_()
            rises.append(loss() - whole)
            columns.copy_(kept)
        found[name] = torch.stack(rises).double().cpu()
    return found


def cut_heads(parent: Parent, way: str, number: int, scores: Scores, seed: int) -> Any:
    """Return a copy with `number` SSM heads in each layer, chosen in one of `HEADS`.

    Args:
        way: `random_N` too, the Nth draw of this seed.
    """
    kind = way.removesuffix("_global")
    mixers = mamba_mixers(parent.model)
    values = {name: _of_heads(kind, name, mixer, scores, seed) for name, mixer in mixers.items()}
    if way.endswith("_global"):
        kept = {name: v.topk(number).indices.sort().values for name, v in values.items()}
        return keep_heads(parent.model, kept)
    groups = next(iter(mixers.values())).n_groups

    def choose(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
        name = axis.rpartition(".")[0]
        return values[name].view(groups, -1), (f"{name}.g",)

    return prune(parent, Plan({"ssm_heads": number // groups}), choose, probe=_probe()).built.model


def cut_channels(parent: Parent, way: str, number: int, scores: Scores, seed: int) -> Any:
    """Return a copy with `number` channels in each SSM head, chosen in one of `CHANNELS`."""
    kind, _, scope = way.partition("_")

    def choose(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
        name = axis.rpartition(".")[0]
        mixer: Any = parent.model.get_submodule(name)
        if kind == "random":
            values = _draw((mixer.num_heads, mixer.head_dim), name, seed, int(scope))
        else:
            values = scores[kind][name]
        if scope == "shared":
            return torch.linalg.vector_norm(values, dim=0), ()
        return values.unflatten(0, (mixer.n_groups, -1)), (f"{name}.g", f"{name}.r")

    return prune(parent, Plan({"ssm_channels": number}), choose, probe=_probe()).built.model


def _of_heads(kind: str, name: str, mixer: Any, scores: Scores, seed: int) -> Tensor:
    """Return a value for each head of a mixer, [H]."""
    if kind.startswith("random_"):
        return _draw((mixer.num_heads,), name, seed, int(kind.removeprefix("random_")))
    if kind == "first":
        return -torch.arange(float(mixer.num_heads))
    values = scores[kind][name]
    return torch.linalg.vector_norm(values, dim=1) if values.ndim == 2 else values


def _draw(size: tuple[int, ...], name: str, seed: int, draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(mix(seed, draw, sum(map(ord, name))))
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _probe() -> dict[str, Tensor]:
    """Inputs on which each cut is held against its masked parent."""
    return dict(input_ids=torch.arange(64).view(2, 32))


@torch.no_grad()
def keep_heads(model: Any, kept: Mapping[str, Tensor]) -> Any:
    """Return a copy with some heads of each mixer, wherever their groups are.

    The heads that stay move up, so some read the B and C of a group that is not theirs: what a
    choice that does not know of groups does to a model.
    """
    state = dict(model.state_dict())
    for name, heads in kept.items():
        mixer: Any = model.get_submodule(name)
        inner, width = mixer.intermediate_size, mixer.head_dim
        rows = (heads[:, None] * width + torch.arange(width)).flatten()
        shared = torch.arange(mixer.conv_dim - inner)
        conv = torch.cat([rows, inner + shared])
        wanted = {
            "in_proj.weight": torch.cat([rows, inner + conv, inner + mixer.conv_dim + heads]),
            **{f"conv1d.{part}": conv for part in ("weight", "bias")},
            **dict.fromkeys(("A_log", "D", "dt_bias"), heads),
            "norm.weight": rows,
        }
        for part, index in wanted.items():
            state[f"{name}.{part}"] = state[f"{name}.{part}"][index]
        state[f"{name}.out_proj.weight"] = state[f"{name}.out_proj.weight"][:, rows]
    config = copy.deepcopy(model.config)
    config.mamba_num_heads = len(next(iter(kept.values())))
    child = type(model)(config)
    child.load_state_dict(state)
    return child.eval()


def cut_width(
    parent: Parent,
    sizes: Iterable[tuple[str, int]],
    columns: Mapping[str, Tensor],
    seed: int | None,
) -> Parent:
    """Cut stream, FFN and heads in each group by contribution; with a seed, at random."""
    shapes = named_shapes(parent.model)

    def choose(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
        if seed is not None:
            return score.random(shapes, axis, seed), ()
        return score.unit_scores(columns, shapes, axis)

    return prune(parent, Plan(dict(sizes)), choose, probe=_probe()).built
