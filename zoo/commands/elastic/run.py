"""`zoo elastic`: one language model whose first units are smaller ones, trained together."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from zoo.axes import Shapes, named_shapes
from zoo.commands.distill.text import Evaluation, TextSetup, evaluated, export, prepare
from zoo.commands.elastic.adaptive import adapt
from zoo.commands.elastic.sizes import ABOUT
from zoo.data.text import TextFeed
from zoo.data.text_mixture import plan_of_rows
from zoo.students.prune.choices import in_layers, least, parse_budgets, parse_choices, words_of
from zoo.students.prune.elastic import (
    FULL,
    Ranks,
    checked_size,
    cut_to,
    numbers,
    parse_sizes,
    rank_units,
    size_of,
    sort_units,
)
from zoo.students.prune.layers import block_influence
from zoo.students.prune.library import Parent
from zoo.students.prune.masked import Masked, Size
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import Cut, is_experts
from zoo.students.prune.ranking import Measure
from zoo.train.config import to_json
from zoo.train.device import autocast, machine
from zoo.train.distill.elastic_config import Elastic
from zoo.train.distill.token_task import TokenTask
from zoo.train.elastic import ElasticTask
from zoo.train.elastic_router import ROUTER, RoutedTask, Router
from zoo.train.loop import train
from zoo.train.mesh import by_first, first_goes_first, slices_of_rank, with_slices
from zoo.train.run import Run, commit
from zoo.train.state import TrainState


@dataclass
class Sizes:
    """The sizes of one sorted model, the whole one last."""

    shapes: Shapes
    by_name: Mapping[str, Size]

    def measured(self, setup: TextSetup, model: Any) -> dict[str, Evaluation]:
        """Measure a model at every size on the held-out rows."""
        masked, found = Masked(model, self.shapes), {}
        for name, size in self.by_name.items():
            with masked.at(size):
                found[name] = evaluated(setup, model)
        return found


def elastic(config: Elastic, *, resume: bool = False) -> Run:
    """Sort a model, train its sizes together, measure and write it.

    Raises:
        ValueError: something that the config names is wrong, or a run cannot be resumed. Nothing
            has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    config = with_slices(config)
    check_names(config)
    if not resume:
        Run.refuse_existing(config.out)
    with first_goes_first():  # tokenises
        setup = prepare(config)
    parent = Parent(setup.student, folder=Path(config.student.removeprefix("lm:")))
    shapes = named_shapes(parent.model)
    plans = plans_of(config, shapes)
    begun = resume and bool(Run(config.out).checkpoints())
    ranks = (
        Run(config.out).read_json(ABOUT)["ranks"]
        if begun
        else sort(parent, shapes, plans, setup, config)
    )
    masked = Masked(parent.model, shapes)
    probe = dict(input_ids=setup.val.rows([0]).ids.to(setup.device))
    named = {
        name: checked_size(parent, masked, plan, ranks, probe, form=config.form)
        for name, plan in plans.items()
    }
    if config.router != "none":  # those were its candidates; it chooses the sizes
        named = {}
    sizes = Sizes(shapes, {**named, FULL: Size()})
    run = Run.reopen(config.out, config) if resume else Run.create(config)
    about = dict(sizes=config.sizes, ranks=ranks, form=config.form)
    run.write_json(ABOUT, about)
    began = time.perf_counter()
    if not begun:
        run.write_json("before.json", sizes.measured(setup, setup.student))
    measured: Mapping[str, Evaluation] = {}
    counts: Mapping[str, int] = {}
    if config.router == "adaptive":
        feed = feed_of(config, setup)
        found = adapt(config, setup, masked, ranks, run, feed, partial(log, run))
        model, measured, counts = found.model, found.after, found.numbers
        about |= dict(sizes=found.sizes, form="zoo", choices=config.choices, budgets=config.sizes)
    elif config.router != "none":
        model, about["sizes"] = route(config, setup, masked, ranks, run)
        plans = parse_sizes(about["sizes"])
        sizes = Sizes(shapes, {n: size_of(shapes, plan, ranks) for n, plan in plans.items()})
        sizes.by_name = {**sizes.by_name, FULL: Size()}
    else:
        model = learn(config, setup, masked, sizes, run)
    by_first(partial(finish, run, setup, sizes, model, about, began, measured, counts))
    return run


def check_names(config: Elastic) -> None:
    """Hold the shares against the sizes, and the router against its choices.

    Raises:
        ValueError: a size says nothing, or there is another number of shares.
    """
    read = parse_sizes if config.router == "none" else parse_budgets
    names = [*read(config.sizes), FULL]
    if config.shares and (len(config.shares) != len(names) or not sum(config.shares)):
        raise ValueError(
            f"shares are {len(config.shares)} numbers and the sizes {', '.join(names)}: give one "
            "for each, not all 0."
        )
    if bool(config.choices) != (config.router != "none"):
        raise ValueError("--choices are those of a --router, and it needs some; give both.")


def plans_of(config: Elastic, shapes: Shapes) -> dict[str, Plan]:
    """Return the sizes that are trained; of a router, all that it may choose, at its least.

    Raises:
        ValueError: a plan names what this model has not.
    """
    if config.router == "none":
        plans = parse_sizes(config.sizes)
    else:
        choices = parse_choices(config.choices, shapes)
        if config.router == "adaptive":
            in_layers(choices, shapes)  # refuses what all layers share
        plans = dict(least=least(choices))
    check_axes(shapes, plans)
    return plans


def check_axes(shapes: Shapes, plans: Mapping[str, Plan]) -> None:
    """Refuse a size that this model has not, before anything is computed.

    Raises:
        ValueError: a plan names what is not there, nothing, or experts.
    """
    for name, plan in plans.items():
        widths = plan.sizes(shapes)
        if plan.sublayers:
            raise ValueError(f"The size {name} leaves out sub-layers; layers go as wholes here.")
        if not widths and plan.layers is None and not plan.stages:
            raise ValueError(f"The size {name} is the whole model, which is there as {FULL!r}.")
        if experts := [axis for axis in widths if is_experts(shapes, axis)]:
            raise ValueError(
                f"The size {name} has fewer experts ({experts[0]}), and a router cannot be masked; "
                "cut them before with zoo prune."
            )


def sort(
    parent: Parent, shapes: Shapes, plans: Mapping[str, Plan], setup: TextSetup, config: Elastic
) -> Ranks:
    """Sort the units of a model in place, the best first, and rank its layers."""

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        rows = setup.train.sample(config.calibration)
        for start in range(0, len(rows), config.batch):
            some = setup.train.rows(rows[start : start + config.batch])
            yield dict(input_ids=some.ids.to(setup.device))

    orders, ranks = by_first(partial(ranked, parent.model, shapes, plans, batches, config))
    parent.model.load_state_dict(sort_units(shapes, parent.model.state_dict(), orders))
    return ranks


def ranked(
    model: nn.Module,
    shapes: Shapes,
    plans: Mapping[str, Plan],
    batches: Callable[[], Iterable[Mapping[str, Any]]],
    config: Elastic,
) -> tuple[list[Cut], dict[str, list[int]]]:
    """Score the units that a size cuts, and the layers if one has fewer."""
    axes = {axis: None for plan in plans.values() for axis in plan.sizes(shapes)}
    measure = Measure(
        model=model, shapes=shapes, batches=batches, axes=tuple(axes), seed=config.seed
    )
    with autocast(config.precision, next(model.parameters()).device):
        orders = rank_units(shapes, plans.values(), measure.rank(config.score))
        influence = {
            entry.path: block_influence(model, entry.path, batches())
            for entry in shapes.layers
            if any(plan.layers is not None or plan.stages for plan in plans.values())
        }
    return orders, {path: x.argsort(descending=True).tolist() for path, x in influence.items()}


def learn(config: Elastic, setup: TextSetup, masked: Masked, sizes: Sizes, run: Run) -> Any:
    """Train a size of the model with each slice."""
    state = TrainState.of(setup.student.train(), config.optim)
    state.resume(run)

    def evaluate(model: Any, step: int) -> None:
        log(run, step, sizes.measured(setup, model))

    inner = TokenTask(config.losses, setup.teachers, specs=setup.specs)
    task = ElasticTask(inner, masked, sizes.by_name, shares=config.shares, seed=config.seed)
    train(task, state, feed_of(config, setup), config, run, evaluate=evaluate, title="train sizes")
    return state.averaged


def route(
    config: Elastic, setup: TextSetup, masked: Masked, ranks: Ranks, run: Run
) -> tuple[Any, str]:
    """Train a size of the model with each slice, and the router that chooses it.

    Returns:
        The model, and what the router chose in the end, as `parse_sizes` reads it.
    """
    shapes, budgets = masked.shapes, parse_budgets(config.sizes)
    choices = parse_choices(config.choices, shapes)
    router = Router(choices, len(budgets)).to(setup.device)
    state = TrainState.of(setup.student.train(), config.optim, parts=dict(router=router))
    state.optimizer.param_groups[-1]["scale"] = config.router_lr / config.optim.lr
    state.resume(run)
    task = RoutedTask(
        TokenTask(config.losses, setup.teachers, specs=setup.specs), masked, router, choices,
        budgets, ranks, steps=config.steps, strength=config.router_cost, shares=config.shares,
        seed=config.seed,
    )  # fmt: skip

    @torch.no_grad()
    def chosen() -> dict[str, str]:
        logits = ({n: router(n, i) for n in choices} for i in range(len(budgets)))
        return dict(zip(budgets, (words_of(choices, one) for one in logits), strict=True))

    def evaluate(model: Any, step: int) -> None:
        plans = {name: Plan.parse(words) for name, words in chosen().items()}
        sizes = Sizes(shapes, {n: size_of(shapes, plan, ranks) for n, plan in plans.items()})
        log(run, step, sizes.measured(setup, model))

    train(task, state, feed_of(config, setup), config, run, evaluate=evaluate, title="train sizes")
    return state.averaged, ";".join(f"{name}:{words}" for name, words in chosen().items())


def feed_of(config: Elastic, setup: TextSetup) -> TextFeed:
    """Return the rows of the text in the order of the run."""
    stream = plan_of_rows(setup.train, config.batch, config.seed)
    slices = slices_of_rank(config.num_slices)
    return TextFeed(setup.train, stream, setup.device, config.num_slices, slices)


def log(run: Run, step: int, found: Mapping[str, Evaluation]) -> None:
    """Log the numbers of every size, its name before each."""
    run.log("eval", step, {f"{n}/{k}": v for n, values in found.items() for k, v in values.items()})


def finish(
    run: Run,
    setup: TextSetup,
    sizes: Sizes,
    model: Any,
    about: dict[str, Any],
    began: float,
    measured: Mapping[str, Evaluation],
    counts: Mapping[str, int],
) -> None:
    """Measure every size, write the whole model, and beside it what its sizes are.

    Args:
        measured: What is known already, of sizes that an adaptive router makes.
        counts: The numbers that a token meets in those.
    """
    config: Any = setup.config
    run.keep(lambda row: row.get("kind", "train") == "train" or row["step"] < config.steps)
    after = {**measured, **sizes.measured(setup, model)}
    log(run, config.steps, after)
    export(run, setup, model)
    Run(run.path / "export").write_json(ABOUT, about)
    if counts:
        shutil.copy(run.path / ROUTER, run.path / "export" / ROUTER)
    run.write_json(
        "about.json",
        dict(
            before=run.read_json("before.json"), after=after,
            numbers={**counts, **{n: numbers(sizes.shapes, s) for n, s in sizes.by_name.items()}},
            commit=commit(), machine=machine(setup.device),
            seconds=time.perf_counter() - began, config=to_json(config),
        ),
    )  # fmt: skip


def print_sizes(config: Elastic) -> None:
    """Build every size of a model once, and print what they are: a dry run, without its data."""
    check_names(config)
    parent = open_parent(config.student.removeprefix("lm:"))
    shapes = named_shapes(parent.model)
    plans = plans_of(config, shapes)
    ranks = {entry.path: list(range(shapes.num_layers(entry.path))) for entry in shapes.layers}
    table = Table("size", "numbers", "share", "what stays")
    for name, plan in plans.items():
        child = cut_to(parent, shapes, plan, ranks, form=config.form).shapes.count()
        stays = [*plan.axes.items(), *([("layers", plan.layers)] if plan.layers else [])]
        stays += [(f"layers@{stage}", number) for stage, number in plan.stages.items()]
        words = ", ".join(f"{what}={amount}" for what, amount in stays)
        table.add_row(name, f"{child:,}", f"{child / shapes.count():.1%}", words)
    table.add_row(FULL, f"{shapes.count():,}", "100%", "everything")
    Console().print(table)
