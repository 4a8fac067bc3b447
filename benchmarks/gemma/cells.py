"""The cells of the comparison: sizes, ways to begin, losses; and what each costs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from zoo.students.prune.plan import Plan

RATE = 790e12 * 0.4
"""Operations a second that an H200 is expected to reach: its measured bf16 product, times 0.4."""

Shape = Literal["width", "depth", "both"]
Begin = Literal["pruned", "random", "scratch"]
Loss = Literal["kd", "ce"]


@dataclass(frozen=True)
class Cell:
    """One student."""

    share: float
    """Of the parent's parameters outside of the embedding."""
    shape: Shape
    begin: Begin
    loss: Loss
    seed: int = 0
    equal_compute: bool = False
    """More steps, for the operations that distillation spends on its teacher."""
    tuned: bool = False
    """Cut from, and taught by, the parent after as many steps on the text itself."""

    @property
    def kind(self) -> str:
        """What its learning rate is chosen for."""
        return f"{'scratch' if self.begin == 'scratch' else 'cut'}-{self.loss}"

    @property
    def name(self) -> str:
        words = [f"{self.share:g}", self.shape, self.begin, self.loss]
        words += [*(["more"] * self.equal_compute), *(["tuned"] * self.tuned)]
        return "-".join([*words, f"s{self.seed}"])


WAYS: tuple[tuple[Begin, Loss, bool], ...] = (
    ("pruned", "kd", False),
    ("pruned", "ce", False),
    ("random", "kd", False),
    ("pruned", "ce", True),
    ("scratch", "ce", False),
)
"""How a student begins, what it learns from, and whether it gets more steps."""
KINDS: tuple[tuple[Begin, Loss], ...] = (
    ("pruned", "kd"), ("pruned", "ce"), ("scratch", "ce"), ("scratch", "kd"),
)  # fmt: skip
"""What a learning rate is chosen for."""
SHAPES: tuple[tuple[float, Shape], ...] = (
    (0.5, "width"), (0.5, "depth"), (0.75, "width"), (0.75, "depth"), (0.75, "both"),
)  # fmt: skip
"""Sizes of which one seed is trained."""


def all_cells(seeds: int) -> list[Cell]:
    """List every cell, those that say most first; more than one seed only for half by both."""

    def half(seed: int) -> list[Cell]:
        ways = [Cell(0.5, "both", begin, loss, seed, more) for begin, loss, more in WAYS]
        return [*ways, Cell(0.5, "both", "pruned", "kd", seed, tuned=True)]

    first = [*half(0), Cell(0.5, "both", "scratch", "kd")]
    others = [
        Cell(share, shape, begin, loss)
        for share, shape in SHAPES
        for begin, loss, _ in WAYS[:3]
    ]  # fmt: skip
    return [*first, *others, *(cell for seed in range(1, seeds) for cell in half(seed))]


def plan_of(config: Any, share: float, shape: Shape) -> Plan:
    """Say what stays of a Gemma 3, for at most a share of its parameters outside the embedding.

    Width takes neurons of the feed-forward layers alone: of all ways to half the size by width that
    one had the lowest perplexity before training. Depth takes whole layers. Both take layers to the
    square root of the share, and then neurons.
    """
    attention, neuron, depth = _block(config)
    budget = share * depth * (attention + neuron * config.intermediate_size)
    if shape == "depth":
        return Plan({}, max(1, math.floor(share * depth)))
    layers = round(depth * math.sqrt(share)) if shape == "both" else depth
    step = 16 if config.intermediate_size >= 512 else 1
    neurons = int((budget / layers - attention) / neuron) // step * step
    if neurons < 1:
        raise ValueError(f"{layers} layers' attention alone is more than {share:g} of the model.")
    return Plan({"ffn": neurons}, layers if layers < depth else None)


def _block(config: Any) -> tuple[int, int, int]:
    """Return the parameters of one attention layer and of one neuron, and the number of layers."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    width = config.hidden_size
    return heads * config.head_dim * width, 3 * width, config.num_hidden_layers


def body(model: Any) -> int:
    """Count the parameters outside of the embedding."""
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def operations(parent: Any, numbers: float, cell: Cell) -> float:
    """Return the operations of training a student of so many parameters on one token.

    Two for each parameter and token forward, twice that backward; the head is as large as the
    embedding, which costs nothing itself.
    """
    head = parent.get_input_embeddings().weight.numel()
    teacher = 2 * (body(parent) + head) if cell.loss == "kd" else 0
    return 6 * (numbers + head) + teacher


def steps_of(parent: Any, cell: Cell, steps: int) -> int:
    """Return the steps of a cell."""
    if not cell.equal_compute:
        return steps
    numbers = cell.share * body(parent)
    spent = [operations(parent, numbers, replace(cell, loss=loss)) for loss in ("kd", "ce")]
    return round(steps * spent[0] / spent[1])


def print_plan(parent: Any, cells: Iterable[Cell], steps: int, tokens: int) -> None:
    """Print what each cell is expected to take."""
    total = 0.0
    for cell in cells:
        there = steps_of(parent, cell, steps)
        each = operations(parent, cell.share * body(parent), cell) * tokens
        total += there * each / RATE
        print(
            f"{cell.name:28} {plan_of(parent.config, cell.share, cell.shape)}  {there} steps, "
            f"{there * each / RATE:5.1f} s"
        )
    print(f"together {total:.0f} s at {RATE / 1e12:.0f} TFLOP/s, without what is not a product")
