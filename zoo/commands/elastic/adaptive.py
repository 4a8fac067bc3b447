"""The part of `zoo elastic` whose router looks at the text: widths for each token and layer."""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.commands.distill.text import Evaluation, TextSetup, evaluated
from zoo.data.text import TextFeed
from zoo.files import save_whole
from zoo.students.prune.choices import chosen, in_layers, parse_budgets, parse_choices
from zoo.students.prune.elastic import Ranks, numbers
from zoo.students.prune.masked import Masked
from zoo.train.device import autocast
from zoo.train.distill.elastic_config import Elastic
from zoo.train.distill.token_task import TokenTask
from zoo.train.elastic_router import ROUTER, AdaptiveTask, Router, Surrogate
from zoo.train.loop import train
from zoo.train.mesh import by_first
from zoo.train.run import Run
from zoo.train.state import TrainState


@dataclass(frozen=True)
class Adapted:
    """What came of a training."""

    model: Any
    after: Mapping[str, Evaluation]
    numbers: Mapping[str, int]
    """Parameters that a token of the held-out rows meets, by budget, on average."""
    sizes: str
    """For each budget the widths that most tokens were given, as `parse_sizes` reads them."""


def adapt(
    config: Elastic,
    setup: TextSetup,
    masked: Masked,
    ranks: Ranks,
    run: Run,
    feed: TextFeed,
    log: Callable[[int, Mapping[str, Evaluation]], None],
) -> Adapted:
    """Train a model and a router that gives each token, in each layer, widths under a budget.

    It learns from what a surrogate predicts of the loss (Flextron, 2406.10260).

    Raises:
        ValueError: a choice is of all layers, as the stream is.
    """
    shapes, budgets = masked.shapes, parse_budgets(config.sizes)
    choices = in_layers(parse_choices(config.choices, shapes), shapes)
    width = setup.student.get_input_embeddings().weight.shape[1]
    router = Router(choices, len(budgets), width=width).to(setup.device)
    surrogate = Surrogate(choices).to(setup.device)
    parts = dict[str, nn.Module](router=router, surrogate=surrogate)
    state = TrainState.of(setup.student.train(), config.optim, parts=parts)
    state.optimizer.param_groups[-1]["scale"] = config.router_lr / config.optim.lr
    state.resume(run)
    task = AdaptiveTask(
        TokenTask(config.losses, setup.teachers), masked, router, choices, budgets, ranks,
        surrogate=surrogate, steps=config.steps, strength=config.router_cost,
        shares=config.shares, seed=config.seed,
    )  # fmt: skip

    def at_budgets(model: Any) -> dict[str, Evaluation]:
        here, found = _of(task, model), {}
        for name in budgets:
            with here.at_budget(name):
                found[name] = evaluated(setup, model)
        return found

    def evaluate(model: Any, step: int) -> None:
        log(step, at_budgets(model))

    train(task, state, feed, config, run, evaluate=evaluate, title="train sizes")
    model = state.averaged
    by_first(lambda: save_router(run, router))
    means = {name: votes(_of(task, model), name, setup) for name in budgets}
    counts = {
        name: round(float(numbers(shapes, chosen(shapes, choices, mean, ranks))))
        for name, mean in means.items()
    }
    words = {name: _words(task, mean) for name, mean in means.items()}
    sizes = ";".join(f"{name}:{text}" for name, text in words.items() if text)
    return Adapted(model, at_budgets(model), counts, sizes)


def save_router(run: Run, router: Router) -> None:
    """Write a router beside the run's configuration."""
    state = {name: x.detach().cpu().contiguous() for name, x in router.state_dict().items()}
    save_whole(state, run.path / ROUTER, lambda x, to: save_file(x, str(to)))


def _of(task: AdaptiveTask, model: Any) -> AdaptiveTask:
    """Return the same router over another model: the average of the one that learns."""
    here = copy.copy(task)
    here.masked = Masked(model, task.masked.shapes)
    return here


@torch.no_grad()
def votes(task: AdaptiveTask, budget: str, setup: TextSetup) -> dict[str, Tensor]:
    """Return for each choice the share of the held-out tokens that took each candidate."""
    config, model, total = setup.config, task.masked.model, dict[str, Tensor]()
    rows = setup.val.sample(config.eval_rows)
    model.eval()
    for start in range(0, len(rows), config.batch):
        tokens = setup.val.rows(rows[start : start + config.batch]).to(setup.device)
        with ExitStack() as stack:
            stack.enter_context(autocast(config.precision, setup.device))
            size, _, shares = stack.enter_context(task.looking(budget, sample=False))
            stack.enter_context(task.masked.at(size))
            model(input_ids=tokens.ids, use_cache=False)
            for name, share in shares.items():
                total[name] = total.get(name, 0) + share.flatten(0, -2).sum(0)
    return {name: share / share.sum() for name, share in total.items()}


def _words(task: AdaptiveTask, means: Mapping[str, Tensor]) -> str:
    """Name the widths that most tokens were given; those of the whole model go unsaid."""
    widths = {
        axis: sizes[int(means[name].argmax())]
        for name, choice in task.choices.items()
        for axis, sizes in choice.widths.items()
    }
    whole = task.masked.shapes.sizes
    return ",".join(f"{axis}={size}" for axis, size in widths.items() if size < whole[axis])
