"""Which layers matter: block influence, and what a metric says when layers are left out.

Everything but block influence asks a set function, `Without`: the metric when these parts of the
model are gone. Parts are layers, or the attention and the FFN inside each (`sublayers`). Scores of
single layers say little about the joint removal of several: `contiguous` and `shapley` look at it.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.axes import Part, Shape, Shapes
from zoo.students.prune.plan import KINDS
from zoo.students.prune.proof import tensors
from zoo.students.prune.taps import Inputs, seen_products
from zoo.students.prune.taylor import gives_logits

Metric = Callable[[nn.Module], float]
"""A loss, a perplexity, one minus an accuracy: the lower, the better."""
SetFunction = Callable[[Collection[int]], float]
FFN = re.compile(f"{KINDS['ffn']}|{KINDS['experts']}|{KINDS['shared']}")


def block_influence(model: nn.Module, path: str, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Score the layers of a list by one minus the cosine between a layer's input and output.

    ShortGPT's block influence, as Minitron (2407.14679, table 1.1 there) uses it. A layer that
    changes the width cannot go: its score is infinite.

    Raises:
        ValueError: there are no batches, or no layer of the list ran.
    """
    layers: Any = model.get_submodule(path)
    sums: list[Any] = [0.0] * len(layers)
    counts: list[Any] = [0] * len(layers)
    mask: Tensor | None = None

    def watch(i: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            del layer
            before, after = _first(args, kwargs), _first((output,), {})
            if before.shape != after.shape:
                sums[i], counts[i] = torch.inf, 1
                return
            channels = 1 if before.ndim == 4 and path.startswith("stages") else -1
            kind = torch.promote_types(before.dtype, torch.float32)
            turned = 1 - F.cosine_similarity(before.to(kind), after.to(kind), dim=channels)
            count: Any = turned.numel()
            if mask is not None and mask.shape == turned.shape:  # of a text, without its padding
                turned, count = turned * mask, mask.sum()
            sums[i] = sums[i] + turned.sum(dtype=torch.float64)  # both stay on the device
            counts[i] = counts[i] + count

        return hook

    hooks = [
        layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad(), seen_products(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(counts):
        raise ValueError(f"Not every layer of {path} ran on this data; are there samples?")
    return torch.tensor([float(s) / float(n) for s, n in zip(sums, counts, strict=True)]).double()


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a layer is given, or gives."""
    value = args[0] if args else kwargs["hidden_states"]
    return value[0] if isinstance(value, tuple) else value


# Parts that are left out


class Without:
    """A metric as a function of which parts of a model are left out; each set is measured once.

    Args:
        parts: Modules, by path.
        adds: The parts are branches beside a residual stream: without one, nothing is added to it.
            Otherwise they are layers, and pass on what they are given.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[str], metric: Metric, *, adds: bool = False
    ):
        self.model, self.parts, self.metric, self.adds = model, parts, metric, adds
        self.known: dict[frozenset[int], float] = {}

    def __call__(self, gone: Collection[int]) -> float:
        key = frozenset(gone)
        if key not in self.known:
            paths = [self.parts[i] for i in key]
            with torch.no_grad(), left_out(self.model, paths, adds=self.adds):
                self.known[key] = self.metric(self.model)
        return self.known[key]


@contextmanager
def left_out(model: nn.Module, paths: Iterable[str], *, adds: bool = False) -> Iterator[None]:
    """Run a model without some of its parts; see `Without`.

    Raises:
        ValueError: (when it runs) a layer changes the shape of what passes, and cannot go.
    """

    def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        before, after = _first(args, kwargs), _first((output,), {})
        if before.shape != after.shape:
            raise ValueError(
                f"{type(layer).__name__} makes {list(after.shape)} of {list(before.shape)}; "
                "it cannot be left out."
            )
        instead = torch.zeros_like(after) if adds else before
        return (instead, *output[1:]) if isinstance(output, tuple) else instead

    hooks = [model.get_submodule(p).register_forward_hook(hook, with_kwargs=True) for p in paths]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def sublayers(model: nn.Module, shapes: Shapes, path: str) -> dict[str, list[str]]:
    """Find the branches inside the layers of a list: paths of `attention` and of `ffn` modules.

    A branch reads the residual stream, and what it gives is added to it: it has no norm over the
    stream inside (BERT's modules have, and are none). Mixers of other kinds count as attention.
    """
    found: dict[str, list[str]] = {"attention": [], "ffn": []}
    layers: Any = model.get_submodule(path)
    for i, layer in enumerate(layers):
        for name, child in layer.named_children():
            prefix = f"{path}.{i}.{name}"
            inside = {n: s for n, s in shapes.tensors.items() if n.startswith(f"{prefix}.")}
            if not {"reads", "writes"} <= {w for shape in inside.values() for w in _ends(shape)}:
                continue
            norms = [n for n, m in child.named_modules() if "Norm" in type(m).__name__]
            widths = [
                inside[f"{prefix}.{n}.weight"] for n in norms if f"{prefix}.{n}.weight" in inside
            ]
            if any(_is_stream(part) for shape in widths for part in shape.dims[0]):
                continue
            letters = {
                re.split(r"[.:]", u)[-1]
                for shape in inside.values()
                for dim in shape.dims
                for part in dim
                if not _is_stream(part)
                for u in part
                if isinstance(u, str)
            }
            kind = "ffn" if all(FFN.fullmatch(letter) for letter in letters) else "attention"
            found[kind].append(prefix)
    return {kind: paths for kind, paths in found.items() if paths}


def _is_stream(part: Part) -> bool:
    return len(part) == 1 and re.fullmatch(r"(.*[.:])?C\d*", str(part[0])) is not None


def _ends(shape: Shape) -> Iterator[str]:
    """Tell whether a weight reads the stream, and whether it writes to it."""
    for i, dim in enumerate(shape.dims):
        if shape.read is not None and any(_is_stream(part) for part in dim):
            yield "reads" if i == shape.read else "writes"


def own_metric(model: nn.Module, batches: Callable[[], Iterable[Inputs]]) -> Metric:
    """Return the loss of the next token; for models of other kinds, one minus the cosine to their
    own outputs as they are now.

    Args:
        batches: Gives the samples again, each time it is asked.
    """
    whole: list[Tensor] = []

    @torch.no_grad()
    def metric(model: nn.Module) -> float:
        total = number = 0.0
        with seen_products(model):
            for i, batch in enumerate(batches()):
                out = next(tensors(model(**batch)))
                if gives_logits(model, batch, out):
                    ids = batch["input_ids"]
                    each = F.cross_entropy(
                        out[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
                    )
                    mask = batch.get("attention_mask", torch.ones_like(ids))[:, 1:].flatten()
                    far, count = (each * mask).sum(), float(mask.sum())
                else:
                    if len(whole) == i:
                        whole.append(out.cpu())
                    far = 1 - F.cosine_similarity(
                        out.float(), whole[i].to(out.device).float(), dim=-1
                    )
                    far, count = far.sum(), far.numel()
                total, number = total + float(far), number + count
        if not number:
            raise ValueError("Layers need data to look at, and there are no samples.")
        return total / number

    metric(model)  # of the whole model, once
    return metric


# Scores from a set function: how much worse it gets without each part


def loss_without(value: SetFunction, length: int) -> Tensor:
    """Score each part by what its removal alone adds to the metric."""
    return torch.tensor([value((i,)) - value(()) for i in range(length)], dtype=torch.float64)


def contiguous(value: SetFunction, length: int, gone: int) -> Tensor:
    """Score 0 the run of `gone` neighbours whose joint removal costs least, and all others 1.

    2408.11796: for half the depth, neighbouring layers keep what single scores lose.
    """
    runs = [tuple(range(start, start + gone)) for start in range(length - gone + 1)]
    best = min(runs, key=value)
    return torch.ones(length, dtype=torch.float64).index_fill(0, torch.tensor(best), 0)


def shapley(value: SetFunction, length: int, *, permutations: int = 16, seed: int = 0) -> Tensor:
    """Estimate each part's Shapley value: its mean marginal cost over orders of removal.

    Seeded permutations, each also in reverse; with all orders it would be exact. For any number
    of them the scores add up to the cost of removing everything.
    """
    draws = torch.Generator().manual_seed(seed)
    scores = torch.zeros(length, dtype=torch.float64)
    orders: list[list[int]] = []
    while len(orders) < permutations:
        order = torch.randperm(length, generator=draws).tolist()
        orders += [order, order[::-1]]
    for order in orders:
        before = value(())
        for i, part in enumerate(order):
            after = value(order[: i + 1])
            scores[part] += after - before
            before = after
    return scores / len(orders)


def difference_of_means(
    value: SetFunction, length: int, *, draws: int = 0, seed: int = 0
) -> Tensor:
    """Score each part by the mean metric without it, minus the mean metric with it.

    The estimate that 2407.16286 released for its "Shapley" (a Banzhaf value): over runs that leave
    out one part each, or, with `draws`, a random half of them.

    Raises:
        ValueError: a part was in all of the draws, or in none.
    """
    if draws:
        random = torch.Generator().manual_seed(seed)
        halves = [torch.randperm(length, generator=random)[: length // 2] for _ in range(draws)]
        runs = [half.tolist() for half in halves]
    else:
        runs = [[i] for i in range(length)]
    values = torch.tensor([value(run) for run in runs], dtype=torch.float64)
    absent = torch.tensor([[i in run for i in range(length)] for run in runs])
    if not absent.any(0).all() or absent.all(0).any():
        raise ValueError(f"{draws} draws left out a part always or never; take more of them.")
    out = (values[:, None] * absent).sum(0) / absent.sum(0)
    return out - (values[:, None] * ~absent).sum(0) / (~absent).sum(0)


def part_scores(method: str, value: SetFunction, length: int, gone: int, *, seed: int) -> Tensor:
    """Score parts by the name of a method; `influence` is no set function."""
    if method == "loss":
        return loss_without(value, length)
    if method == "shapley":
        return shapley(value, length, seed=seed)
    if method == "means":
        return difference_of_means(value, length)
    assert method == "contiguous", method
    return contiguous(value, length, gone)
