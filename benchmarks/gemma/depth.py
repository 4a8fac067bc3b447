"""Depth: which layers and sub-layers of the parent can go, and what an emulation gives back.

Choices look at a few rows of the seen text; the perplexities are those of the held-out text.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gemma.results import Results
from benchmarks.gemma.rows import Texts
from benchmarks.gemma.students import LAYERS
from benchmarks.gemma.training import Settings, perplexity
from zoo.axes import named_shapes
from zoo.students.prune.emulate import emulate
from zoo.students.prune.layers import Without, block_influence, loss_without, shapley, sublayers
from zoo.students.prune.library import Parent

CHOOSING, FITTING, PERMUTATIONS = 16, 32, 8
"""Rows that choices and emulations look at, and orders of removal for Shapley values."""
RANKS: dict[str, int | None] = {"nothing": None, "a constant": 0, "rank 32": 32}
"""What is put in the place of a sub-layer."""
Say = Callable[[str], object]


def study_depth(parent: Any, texts: Texts, settings: Settings, results: Results, say: Say) -> None:
    """Measure what goes first by each score, and what its emulation gives back."""

    def chosen_by(model: Any) -> float:
        return math.log(perplexity(model, texts.seen, settings, rows=CHOOSING))

    def reported(model: Any) -> float:
        return perplexity(model, texts.held, settings)

    depth = parent.config.num_hidden_layers
    parts = {"layers": [f"{LAYERS}.{i}" for i in range(depth)]}
    parts |= sublayers(parent, named_shapes(parent), LAYERS)
    batches = [
        dict(input_ids=texts.seen.rows(range(i, i + 4)).ids.to(settings.device))
        for i in range(0, FITTING, 4)
        if i + 4 <= len(texts.seen)
    ]
    found: dict[str, Any] = {"removed": [], "emulated": []}
    orders: dict[str, list[int]] = {}
    for what, paths in parts.items():
        value = Without(parent, paths, chosen_by, adds=what != "layers")
        scores: dict[str, Tensor] = {
            "loss": loss_without(value, depth),
            "Shapley": shapley(value, depth, permutations=PERMUTATIONS),
        }
        if what == "layers":
            with torch.autocast(
                settings.device.type, torch.bfloat16, settings.device.type == "cuda"
            ):
                scores["block influence"] = block_influence(parent, LAYERS, batches)
        shown = Without(parent, paths, reported, adds=what != "layers")
        for name, score in scores.items():
            order = score.argsort().tolist()
            orders.setdefault(what, order)
            curve = [shown(order[:gone]) for gone in range(depth // 2 + 1)]
            found["removed"].append(dict(what=what, by=name, order=order, perplexity=curve))
            say(f"{what} by {name}, first {order[:5]}: " + " ".join(f"{p:.1f}" for p in curve))
    for what in ("attention", "ffn"):
        for gone in (1, depth // 6, depth // 3):
            paths = [parts[what][i] for i in orders[what][:gone]]
            row = dict(what=what, gone=gone) | emulated(parent, paths, batches, reported)
            found["emulated"].append(row)
            say(f"emulated {row}")
    results.put("depth", found)


def emulated(
    parent: Any, paths: list[str], batches: list[dict[str, Tensor]], reported: Callable
) -> dict[str, float]:
    """Measure the parent with each kind of substitute for some of its parts."""
    return {
        name: reported(emulate(Parent(parent), paths, lambda: batches, rank=rank).model)
        for name, rank in RANKS.items()
    }


def depth_table(depth: dict[str, Any]) -> str:
    """Write perplexities by what is gone, and with emulations, as two tables of Markdown."""
    counts = range(len(depth["removed"][0]["perplexity"]))
    lines = [
        "| removed | by | first | " + " | ".join(map(str, counts)) + " |",
        "| --- " * (3 + len(counts)) + "|",
    ]
    for row in depth["removed"]:
        first = ", ".join(map(str, row["order"][:5]))
        values = " | ".join(f"{p:.1f}" for p in row["perplexity"])
        lines.append(f"| {row['what']} | {row['by']} | {first} | {values} |")
    lines += ["", "| removed | how many | " + " | ".join(RANKS) + " |"]
    lines.append("| --- " * (2 + len(RANKS)) + "|")
    for row in depth["emulated"]:
        values = " | ".join(f"{row[name]:.1f}" for name in RANKS)
        lines.append(f"| {row['what']} | {row['gone']} | {values} |")
    return "\n".join(lines)
