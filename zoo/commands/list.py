"""`zoo list`: the models of zoo's own families, and the recipes."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import tyro

from zoo.commands.model_table import ModelFacts, read_table
from zoo.commands.parse import parse
from zoo.language.towers import facts_of, list_language_models

if TYPE_CHECKING:
    from zoo.train.distill.config import Distill


@dataclass(frozen=True, kw_only=True)
class ListArgs:
    pattern: tyro.conf.Positional[str] = ""
    """A shell pattern, e.g. "eradio*"; or `recipes`, for what `zoo distill` can run; or
    `protocols`, how papers measure, for `zoo eval --protocol`."""
    kind: Literal["vision", "language"] = "vision"
    """vision: backbones for timm; language: names of transformers' causal language models."""


def main(argv: list[str]) -> None:
    """Show the models of zoo's own families: parameters, image size, weights and licence.

    Of language models: parameters, layers, context (positions) and licence.

    Examples: zoo list "eradio*"      zoo list recipes      zoo list --kind language "nemotron*"
    """
    args = parse(ListArgs, argv, "list", main.__doc__ or "")
    if args.pattern == "recipes":
        list_recipes()
    elif args.pattern == "protocols":
        list_protocols()
    elif args.kind == "language":
        print_language_models(args.pattern)
    else:
        print_models(args.pattern)


def print_models(pattern: str) -> None:
    """Print the models whose name, with or without a tag of weights, fits a shell pattern.

    Raises:
        ValueError: there is none.
    """
    from rich.console import Console
    from rich.table import Table

    models = {n: facts for n, facts in read_table().items() if _fits(n, facts, pattern)}
    if not models:
        others = len(list_language_models(pattern))
        hint = f" Of language models {others} do: --kind language." if others else ""
        raise ValueError(f"No model matches {pattern!r}; `zoo list` shows all.{hint}")
    table = Table()
    for column in ("model", "parameters", "size", "weights", "licence"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for name, facts in models.items():
        rows, cols = facts.size
        table.add_row(
            name,
            f"{facts.parameters / 1e6:,.2f} M",
            str(cols) if rows == cols else f"{rows}x{cols}",
            "\n".join(facts.weights) or "-",
            "\n".join(facts.weights.values()) or "-",
        )
    Console().print(table)


def print_language_models(pattern: str) -> None:
    """Print the names of language models that fit a shell pattern.

    Raises:
        ValueError: there is none.
    """
    from rich.console import Console
    from rich.table import Table

    names = list_language_models(pattern)
    if not names:
        raise ValueError(
            f"No language model matches {pattern!r}; `zoo list --kind language` shows all."
        )
    table = Table("model", "parameters", "layers", "context", "licence", "weights")
    for name in names:
        facts = facts_of(name)
        table.add_row(
            name,
            f"{facts.parameters / 1e6:,.2f} M",
            str(facts.layers),
            f"{facts.context:,}" if facts.context else "no limit",
            facts.licence,
            facts.weights or "-",
        )
    for column in table.columns[1:4]:
        column.justify = "right"
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no width that names should be cut to
    console.print(table)


def _fits(name: str, facts: ModelFacts, pattern: str) -> bool:
    names = (name, *(f"{name}.{tag}" for tag in facts.weights))
    return not pattern or any(fnmatchcase(one, pattern) for one in names)


def list_recipes() -> None:
    """Show the recipes and their stages: what each makes, from what, at which size, how long."""
    from rich.console import Console
    from rich.table import Table

    from zoo.train.distill.recipes import IMAGES, RECIPES, summary_of
    from zoo.train.distill.stages import stages_of

    table = Table("recipe", "what it does", show_lines=True)
    for column in ("teachers", "student", "training"):
        table.add_column(column, overflow="fold")  # names are for copying
    for name, recipe in RECIPES.items():
        stages = stages_of(recipe())
        for number, (stage, run) in enumerate(stages.items(), 1):
            sides = ", ".join(map(str, run.sizes or (run.size,)))
            goes_on = f"\nfrom {run.start}" if run.start else ""
            teachers = "\n".join(spec.describe() for spec in run.teachers) or "yours"
            table.add_row(
                f"{name}\n{number} {stage}" if stage else name,
                summary_of(recipe) if number == 1 else "",
                teachers,
                f"{run.student}\n{sides} px{goes_on}",
                _training(run),
            )
        if name in IMAGES:
            images = sum(run.steps * run.samples for run in stages.values())
            both = f"{_count(images)} images\npaper {_count(IMAGES[name])}"
            table.add_row(name, "", "", "in all", both)
    Console().print(table)


def _training(run: "Distill") -> str:
    """Say how long a run is, and with what rate and average it learns."""
    batches = run.batches or (run.batch,)
    batch = f"{min(batches):,} to {max(batches):,}" if run.batches else f"{run.batch:,}"
    average = f"average {run.optim.ema}" if run.optim.ema else "no average"
    return (
        f"{run.steps:,} steps of {batch}\n{_count(run.steps * run.samples)} images\n"
        f"rate {run.optim.lr:g}, {average}"
    )


def _count(images: float) -> str:
    return f"{images / 1e6:,.3g} M" if images >= 1e6 else f"{images:,.0f}"


def list_protocols() -> None:
    """Show the protocols of `zoo eval --protocol`: source, settings, and what departs from it."""
    from zoo.eval.protocols import PROTOCOLS

    for name, make in PROTOCOLS.items():
        protocol = make()
        print(f"{name}: --on {protocol.on}, {protocol.source}")
        print(f"    {(make.__doc__ or '').splitlines()[0]}")
        for line in protocol.departures:
            print(f"    departs: {line}")
