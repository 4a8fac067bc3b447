"""Routers: which widths a budget gets, learnt beside the model that has them.

A static router knows the budget alone (Nemotron Elastic, 2511.16664). An adaptive one also sees the
hidden states that enter each layer, and learns through a surrogate that predicts the loss from its
logits, because the loss's own gradients say little about choices (Flextron, 2406.10260).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from zoo.axes import named_shapes
from zoo.files import read_json
from zoo.students.prune.choices import Choice, chosen, in_layers, parse_budgets, parse_choices
from zoo.students.prune.elastic import FULL, Ranks, numbers
from zoo.students.prune.masked import Masked, Size
from zoo.train.elastic import ElasticTask
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

TAU, SCALE = (1.0, 0.05), (1.0, 10.0)
"""First and last temperature of the Gumbel softmax and scale of its logits (2511.16664); linear."""
HIDDEN = 256
ROUTER = "router.safetensors"
"""The file of an adaptive router, beside the model that it is of."""


def choose(
    logits: Float[Tensor, "*B choices"], done: float, *, sample: bool = True
) -> Float[Tensor, "*B choices"]:
    """Return which candidate is taken, one-hot; its gradient is that of the Gumbel softmax.

    Args:
        done: Share of the training that is over.
        sample: Draw; otherwise take the likeliest.
    """
    tau, scale = (first + done * (last - first) for first, last in (TAU, SCALE))
    logits = scale * logits.float()
    if sample:
        logits = logits - torch.empty_like(logits).exponential_().log()
    soft = (logits / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


class Router(nn.Module):
    """Logits of every choice, from a one-hot budget, and from hidden states `width` wide."""

    def __init__(self, choices: Mapping[str, Choice], budgets: int, width: int = 0):
        super().__init__()
        self.names, self.budgets, self.width = list(choices), budgets, width
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(budgets + width, HIDDEN),
                nn.LeakyReLU(),
                nn.Linear(HIDDEN, len(choice.words)),
            )
            for choice in choices.values()
        )

    def forward(
        self, name: str, budget: int, x: Float[Tensor, "*B C"] | None = None
    ) -> Float[Tensor, "*B choices"]:
        mlp = self.mlps[self.names.index(name)]
        weight = next(mlp.parameters())
        given = weight.new_zeros(self.budgets)
        given[budget] = 1
        if x is not None:
            given = torch.cat([given.expand(*x.shape[:-1], -1), x.detach().to(given.dtype)], -1)
        return mlp(given)


class Surrogate(nn.Module):
    """Predict the loss of a slice from the mean logits of the choices that were made in it."""

    def __init__(self, choices: Mapping[str, Choice]):
        super().__init__()
        width = sum(len(choice.words) for choice in choices.values())
        self.mlp = nn.Sequential(nn.Linear(width, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, logits: Float[Tensor, " choices"]) -> Float[Tensor, ""]:
        return self.mlp(logits)[0]


class RoutedTask(ElasticTask):
    """Another task's losses at the widths that a static router chooses for a budget.

    To them comes `cost`, |parameters − budget|, both as shares of the whole model's. The router
    gets the gradients of both, by the choices that were taken (straight through).

    Args:
        budgets: By name; the whole model is drawn beside them, as the last one.
        ranks: Of the layers, if some choice is how many stay.
        steps: Of the whole training, over which the choices become certain.
        strength: Weight of the cost.
    """

    own = ("cost",)

    def __init__(
        self,
        inner: Task,
        masked: Masked,
        router: Router,
        choices: Mapping[str, Choice],
        budgets: Mapping[str, float],
        ranks: Ranks,
        *,
        steps: int,
        strength: float = 1.0,
        shares: Sequence[float] = (),
        seed: int = 0,
    ):
        names = dict.fromkeys((*budgets, FULL), Size())
        super().__init__(inner, masked, names, shares=shares, seed=seed)
        self.router, self.choices, self.budgets, self.ranks = router, choices, budgets, ranks
        self.steps, self.strength, self.whole = steps, strength, numbers(masked.shapes, Size())

    @property
    def learned(self) -> list[nn.Module]:
        """What learns beside the model."""
        return [self.router]

    def losses(self, state: TrainState, batch: Any, targets: Any, step: int) -> dict[str, Loss]:
        name, done = self.drawn(batch.positions[0]), min(1.0, step / max(1, self.steps - 1))
        if name != FULL:
            return self.routed(name, done, state, batch, targets, step)
        losses = self.at(Size(), state, batch, targets, step)
        used = [p.sum() for module in self.learned for p in module.parameters()]
        nothing = 0 * torch.stack(used).sum()  # every slice has the same graph
        return losses | {own: Loss(nothing, _count(losses)) for own in self.own}

    def routed(
        self, name: str, done: float, state: TrainState, batch: Any, targets: Any, step: int
    ) -> dict[str, Loss]:
        """Return the losses at the widths that are chosen for a budget."""
        size = self.size(name, done)
        losses = self.at(size, state, batch, targets, step)
        return losses | {"cost": Loss.of_mean(self.over(size, name), _count(losses))}

    def size(self, budget: str, done: float = 1.0, *, sample: bool = True) -> Size:
        """Choose the widths for a budget."""
        index = list(self.budgets).index(budget)
        shares = {n: choose(self.router(n, index), done, sample=sample) for n in self.choices}
        return chosen(self.masked.shapes, self.choices, shares, self.ranks)

    def over(self, size: Size, budget: str) -> Tensor:
        """Return how far a size is from its budget, as a share of the whole model."""
        return (numbers(self.masked.shapes, size) / self.whole - self.budgets[budget]).abs()

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        inner = {name: loss for name, loss in losses.items() if name not in self.own}
        weights = dict(cost=self.strength)
        own = [weights.get(name, 1.0) * losses[name] for name in self.own]
        return self.inner.weigh(inner, step) + torch.stack(own).sum()

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        self.inner.observe({n: x for n, x in means.items() if n not in self.own}, step)


class AdaptiveTask(RoutedTask):
    """The same with choices for each token, or each image, made where its layer begins.

    The model learns at the widths that were drawn. The router does not get its gradients but those
    of the surrogate (`predicted`), which itself learns to predict the loss of each slice.

    Args:
        pooled: One choice for all tokens of a sample, from their mean.
    """

    own = ("cost", "surrogate", "predicted")

    def __init__(self, *args: Any, surrogate: Surrogate, pooled: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.surrogate, self.pooled = surrogate, pooled

    @property
    def learned(self) -> list[nn.Module]:
        return [self.router, self.surrogate]

    def routed(
        self, name: str, done: float, state: TrainState, batch: Any, targets: Any, step: int
    ) -> dict[str, Loss]:
        with self.looking(name, done) as (size, logits, shares):
            losses = self.at(size, state, batch, targets, step)
        count = _count(losses)
        mean = {choice: share.flatten(0, -2).mean(0) for choice, share in shares.items()}
        over = self.over(chosen(self.masked.shapes, self.choices, mean, self.ranks), name)
        seen = torch.stack([loss.total.detach().sum() for loss in losses.values()]).sum() / count
        x = torch.cat([logits[choice].flatten(0, -2).mean(0) for choice in self.choices])
        missed = (self.surrogate(x.detach()) - seen).square()
        frozen = {n: p.detach() for n, p in self.surrogate.named_parameters()}
        predicted = functional_call(self.surrogate, frozen, (x,))
        found = dict(cost=over, surrogate=missed, predicted=predicted)
        return losses | {own: Loss.of_mean(value, count) for own, value in found.items()}

    @contextmanager
    def looking(
        self, budget: str, done: float = 1.0, *, sample: bool = True
    ) -> Iterator[tuple[Size, dict[str, Tensor], dict[str, Tensor]]]:
        """Let the router look at what enters each layer; the size follows it."""
        index = list(self.budgets).index(budget)
        logits: dict[str, Tensor] = {}
        shares: dict[str, Tensor] = {}

        def watch(names: list[str]):
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                del module
                x = args[0] if args else kwargs["hidden_states"]
                x = x.mean(1, keepdim=True) if self.pooled else x
                for name in names:
                    logits[name] = self.router(name, index, x)
                    shares[name] = choose(logits[name], done, sample=sample)

            return hook

        hooks = []
        for within in {choice.within: None for choice in self.choices.values()}:
            names = [n for n, choice in self.choices.items() if choice.within == within]
            layer = self.masked.model.get_submodule(within)
            hooks.append(layer.register_forward_pre_hook(watch(names), with_kwargs=True))
        later = {name: lambda name=name: shares[name].detach() for name in self.choices}
        try:
            yield chosen(self.masked.shapes, self.choices, later, self.ranks), logits, shares
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def at_budget(self, budget: str) -> Iterator[None]:
        """Let the model compute as the router says, each token at its likeliest widths."""
        with self.looking(budget, sample=False) as (size, _, _), self.masked.at(size):
            yield


def open_router(model: nn.Module, folder: Path, ranks: Ranks | None = None) -> AdaptiveTask:
    """Put the router in the export of `zoo elastic --router adaptive` over its model.

    `with open_router(model, folder).at_budget("half"): model(...)`.

    Raises:
        ValueError: the folder has no router.
    """
    if not (folder / ROUTER).is_file():
        raise ValueError(f"{folder} has no {ROUTER}; zoo elastic --router adaptive writes one.")
    about, shapes = read_json(folder / "elastic.json"), named_shapes(model)
    choices = in_layers(parse_choices(about["choices"], shapes), shapes)
    budgets = parse_budgets(about["budgets"])
    state = load_file(str(folder / ROUTER))
    width = state["mlps.0.0.weight"].shape[1] - len(budgets)
    router = Router(choices, len(budgets), width=width)
    router.load_state_dict(state)
    router.to(next(model.parameters()).device)
    return AdaptiveTask(
        Task, Masked(model, shapes), router, choices, budgets, ranks or {},
        surrogate=Surrogate(choices), steps=1,
    )  # fmt: skip


def _count(losses: Mapping[str, Loss]) -> int:
    return next(iter(losses.values())).count
