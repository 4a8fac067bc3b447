"""Widths to choose from: what a router of an elastic model decides."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zoo.axes import Axis, Shapes
from zoo.students.prune.elastic import FULL, Ranks
from zoo.students.prune.masked import Share, Size, Widths
from zoo.students.prune.plan import Plan


@dataclass(frozen=True)
class Choice:
    """One decision: each candidate gives axes a width, or says how many layers stay."""

    words: tuple[str, ...]
    """The candidates, as `zoo prune --to` takes them."""
    widths: Mapping[Axis, tuple[int, ...]] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """How many stay of each list."""
    within: str = ""
    """The layer that it is made in, if not once for the whole model."""


def parse_choices(text: str, shapes: Shapes) -> dict[str, Choice]:
    """Read `ffn=0.5|0.75|1.0,layers=4|6`: for each word one choice for the whole model.

    Raises:
        ValueError: a word has fewer than two candidates, or this model has nothing of that name.
    """
    found: dict[str, Choice] = {}
    for word in filter(None, text.replace(" ", "").split(",")):
        what, _, amounts = word.partition("=")
        words = tuple(f"{what}={amount}" for amount in amounts.split("|"))
        plans = [Plan.parse(candidate) for candidate in words]
        sizes = [plan.sizes(shapes) for plan in plans]
        axes = {axis: None for size in sizes for axis in size}
        layers = {}
        if what == "layers":
            lengths = {entry.path: shapes.num_layers(entry.path) for entry in shapes.layers}
            layers = {p: tuple(plan.num_layers(p, n) for plan in plans) for p, n in lengths.items()}
        if len(words) < 2 or not (axes or layers) or what in found:
            raise ValueError(
                f"{word!r} leaves no choice; write what=share|share, once for each what, for "
                "example ffn=0.5|0.75|1.0,layers=4|6."
            )
        widths = {a: tuple(size.get(a, shapes.sizes[a]) for size in sizes) for a in axes}
        found[what] = Choice(words, widths, layers)
    if not found:
        raise ValueError("A router needs choices, for example ffn=0.5|0.75|1.0,heads=0.5|1.0.")
    return found


def parse_budgets(text: str) -> dict[str, float]:
    """Read `small:params=0.5;medium:params=0.75`: a share of the parameters for each name.

    Raises:
        ValueError: a part is no budget, or a name is there twice.
    """
    budgets: dict[str, float] = {}
    for part in filter(None, text.replace(" ", "").split(";")):
        match = re.fullmatch(r"(\w[\w.-]*):params=(0?\.\d+)", part)
        if match is None or match[1] in (FULL, *budgets) or not float(match[2]):
            raise ValueError(
                f"{part!r} is no budget for a router: write NAME:params=SHARE with a share below "
                "1, for example small:params=0.5;medium:params=0.75."
            )
        budgets[match[1]] = float(match[2])
    if not budgets:
        raise ValueError("A router needs budgets: --sizes 'small:params=0.5;medium:params=0.75'.")
    return budgets


def least(choices: Mapping[str, Choice]) -> Plan:
    """Return the first candidates of all choices together."""
    return Plan.parse(",".join(choice.words[0] for choice in choices.values()))


def in_layers(choices: Mapping[str, Choice], shapes: Shapes) -> dict[str, Choice]:
    """Make each choice once for every layer whose units it is about.

    Raises:
        ValueError: it is about what all layers share, the stream or their number.
    """
    paths = "|".join(re.escape(entry.path) for entry in shapes.layers)
    found: dict[str, Choice] = {}
    for what, choice in choices.items():
        for axis, sizes in choice.widths.items():
            match = re.match(rf"(?:{paths})\.\d+(?=\.)", axis)
            if match is None:
                raise ValueError(f"{what} is of all layers ({axis}); it cannot be chosen in each.")
            name = f"{match[0]}:{what}"
            one = found.get(name) or replace(choice, widths={}, within=match[0])
            found[name] = replace(one, widths={**one.widths, axis: sizes})
        if choice.layers:
            raise ValueError("The number of layers cannot be chosen in each of them.")
    return found


def chosen(
    shapes: Shapes,
    choices: Mapping[str, Choice],
    shares: Mapping[str, Share | Callable[[], Share]],
    ranks: Ranks,
) -> Size:
    """Return the size that choices make, of which there are such shares."""
    widths, layers = {}, {}
    for name, choice in choices.items():
        share = shares[name]
        widths |= {axis: Widths(sizes, share) for axis, sizes in choice.widths.items()}
        for path, numbers in choice.layers.items():
            assert isinstance(share, Tensor)
            table = torch.zeros(len(numbers), shapes.num_layers(path))
            for row, number in zip(table, numbers, strict=True):
                row[list(ranks[path][:number])] = 1
            layers[path] = share @ table.to(share)
    return Size(widths, layers)


def words_of(choices: Mapping[str, Choice], shares: Mapping[str, Tensor]) -> str:
    """Return a size in words: of each choice, the candidate of which there is most."""
    return ",".join(choice.words[int(shares[n].argmax())] for n, choice in choices.items())
