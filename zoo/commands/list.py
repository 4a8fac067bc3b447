"""`zoo list`: the models of zoo's own families, and the recipes."""

from dataclasses import dataclass
from typing import Any

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class ListArgs:
    pattern: tyro.conf.Positional[str] = ""
    """A shell pattern, e.g. "eradio*"; or `recipes`, for what `zoo distill` can run."""


def main(args: list[str]) -> None:
    """Show the models of zoo's own families: parameters, input size, weights and licence.

    Examples: zoo list "eradio*"      zoo list recipes
    """
    import timm
    import torch
    from rich.console import Console
    from rich.table import Table

    import zoo

    asked = parse(ListArgs, args, "list", main.__doc__ or "")
    if asked.pattern == "recipes":
        return list_recipes()
    names = zoo.list_models(asked.pattern)
    if not names:
        raise ValueError(f"No model matches {asked.pattern!r}; `zoo list` shows all.")
    table = Table()
    for column in ("model", "parameters", "size", "weights", "licence"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for name in names:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        params = sum(p.numel() for p in model.parameters())
        rows, cols = model.pretrained_cfg["input_size"][1:]
        weights: list[Any] = [timm.get_pretrained_cfg(w) for w in timm.list_pretrained(f"{name}.*")]
        table.add_row(
            name,
            f"{params / 1e6:,.2f} M",
            str(cols) if rows == cols else f"{rows}x{cols}",
            "\n".join(w.tag for w in weights) or "-",
            "\n".join(w.license or "-" for w in weights) or "-",
        )
    Console().print(table)
    return None


def list_recipes() -> None:
    """Show the recipes: what each makes, from what, at which size."""
    from rich.console import Console
    from rich.table import Table

    from zoo.train.distill.recipes import RECIPES, summary_of

    table = Table("recipe", "what it does", show_lines=True)
    for column in ("teachers", "student"):
        table.add_column(column, overflow="fold")  # names are for copying
    for name, recipe in RECIPES.items():
        run = recipe()
        sides = ", ".join(str(side) for side in run.sizes or (run.size,))
        teachers = "\n".join(spec.describe() for spec in run.teachers) or "yours"
        table.add_row(name, summary_of(recipe), teachers, f"{run.student}\n{sides} px")
    Console().print(table)
