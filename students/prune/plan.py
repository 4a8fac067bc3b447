"""What to cut: words such as `ffn=0.75,heads=0.5,stream=0.75,layers=0.8`, and their sizes."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache

from zoo.axes import Axis, Shapes
from zoo.students.prune.budget import BUDGETS

KINDS = {
    "stream": r"C\d*",
    "ffn": r"[fmn]\d*",
    "heads": r"[hq]",
    "groups": "k",
    "experts": "e",
    "shared": "t",
    "ssm_heads": "r",
    "ssm_channels": "p",
    "ssm_state": "s",
    "ssm_rank": "l",
}
"""A word for each kind of axis, and the letters that the tables have for it. `ffn@2`: those of
stage 2 alone, or of layer 2 where there are no stages."""


VISION, LANGUAGE = PARTS = ("vision", "language")
"""Before a word and a dot, the parts of a model of images and text: `vision.ffn`. Its projector is
of the language part, whose width it has."""
PROJECTOR = "multi_modal_projector"
BRANCHES = {"attention_layers": "attention", "ffn_layers": "ffn"}


@dataclass(frozen=True)
class Plan:
    """Shares (at most 1.0) or numbers of units to keep, by kind or by a pattern of axes.

    Args:
        axes: `ffn`, `heads`, ... or a shell pattern such as `model.layers.3.mlp.f`; later ones win.
        layers: Share or number of the layers of each list to keep.
        sublayers: Share or number of `attention` and `ffn` branches to keep, of all layers.
        stages: Share or number of the layers to keep of the list in one stage, which then counts.
        parts: Share or number of the layers of each list in a part, `vision` or `language`.
    """

    axes: Mapping[str, float | int]
    layers: float | int | None = None
    sublayers: Mapping[str, float | int] = field(default_factory=dict)
    stages: Mapping[int, float | int] = field(default_factory=dict)
    parts: Mapping[str, float | int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read `ffn=0.75,heads=4,layers=0.5`: a whole number is a count, a fraction a share.

        Raises:
            ValueError: a word is no `what=number`, or a number is not above 0.
        """
        axes: dict[str, float | int] = {}
        for word in filter(None, text.replace(" ", "").split(",")):
            what, _, number = word.partition("=")
            try:
                value = float(number) if re.search(r"[.e]", number) else int(number)
            except ValueError:
                value = 0
            if value <= 0 or (isinstance(value, float) and value > 1):
                known = ", ".join([*KINDS, "layers", *BRANCHES])
                raise ValueError(
                    f"{word!r} says nothing to keep; write what=share, 0 to 1 (ffn=0.75), or "
                    f"what=number (heads=4). What: {known} or an axis."
                )
            axes[what] = value
        if not axes:
            raise ValueError("Nothing is to be cut; give for example ffn=0.75,layers=0.5.")
        layers = axes.pop("layers", None)
        branches = {kind: axes.pop(word) for word, kind in BRANCHES.items() if word in axes}
        staged = [word for word in axes if re.fullmatch(rf"({VISION}\.)?layers@\d+", word)]
        stages = {int(word.partition("@")[2]): axes.pop(word) for word in staged}
        listed = [part for part in PARTS if f"{part}.layers" in axes]
        parts = {part: axes.pop(f"{part}.layers") for part in listed}
        return cls(axes, layers, branches, stages, parts)

    def sizes(self, shapes: Shapes) -> dict[Axis, int]:
        """Return the new size of each axis that is cut.

        Raises:
            ValueError: nothing here is of a kind that the plan names, its size is fixed, or
                more units are asked for than there are.
        """
        sizes = {}
        lists = {stage_of(entry.path) for entry in shapes.layers}
        if unknown := self.stages.keys() - lists:
            known = [f"layers@{n}" for n in sorted(n for n in lists if n is not None)] or ["layers"]
            raise ValueError(
                f"No list of layers is in a stage {min(unknown)}; there are {', '.join(known)}."
            )
        if missing := self.parts.keys() - {part_of(entry.path) for entry in shapes.layers}:
            raise ValueError(f"This model has no list of layers in its {min(missing)} part.")
        for what, amount in self.axes.items():
            found = [axis for axis in shapes.sizes if names(what, axis)]
            cuttable = [axis for axis in found if axis not in shapes.fixed]
            if not cuttable:
                raise ValueError(_nothing(what, found, shapes))
            sizes |= {axis: _amount(what, amount, shapes.sizes[axis]) for axis in cuttable}
        for axis, leader in shapes.follows.items():
            if leader in sizes and axis not in sizes:
                share = sizes[leader] / shapes.sizes[leader]
                sizes[axis] = max(1, round(shapes.sizes[axis] * share))
        return {axis: size for axis, size in sizes.items() if size != shapes.sizes[axis]}

    def num_layers(self, path: str, length: int) -> int:
        """Return how many of the `length` layers of the list at `path` stay."""
        stage = stage_of(path)
        if stage is not None and stage in self.stages:
            return _amount(f"layers@{stage}", self.stages[stage], length)
        if (part := part_of(path)) in self.parts:
            return _amount(f"{part}.layers", self.parts[part], length)
        return length if self.layers is None else _amount("layers", self.layers, length)

    def num_sublayers(self, kind: str, length: int) -> int:
        """Return how many of `length` branches of a kind stay."""
        return _amount(f"{kind}_layers", self.sublayers[kind], length)


def stage_of(name: Axis) -> int | None:
    """Return the first number in the name of an axis or of a list of layers."""
    match = re.search(r"\d+", name)
    return int(match[0]) if match else None


@cache
def part_of(place: str) -> str:
    """Return the part of a model of images and text that an axis, or a path, lies in."""
    return VISION if re.search(r"(^|\.)vision_(tower|model)([.:]|$)", place) else LANGUAGE


@cache
def names(what: str, axis: Axis) -> bool:
    """Tell whether a word of a plan names an axis."""
    part, dot, rest = what.partition(".")
    if dot and part in PARTS:
        return part_of(axis) == part and names(rest, axis)
    letter = re.split(r"[.:]", axis)[-1]
    kind, _, stage = what.partition("@")
    if kind not in KINDS:
        return fnmatchcase(axis, what)
    here = not stage or stage == str(stage_of(axis))
    return here and re.fullmatch(KINDS[kind], letter) is not None


def in_part(word: str, part: str) -> str:
    """Let a word of a plan that names a kind speak of one part alone."""
    what = word.partition("=")[0].partition("@")[0]
    return f"{part}.{word}" if what in (*KINDS, "layers") else word


def _amount(what: str, amount: float | int, size: int) -> int:
    if isinstance(amount, int) and amount > size:
        raise ValueError(f"{what}={amount} keeps more than the {size} there are.")
    return amount if isinstance(amount, int) else max(1, math.floor(size * amount + 0.5))


def _nothing(what: str, found: list[Axis], shapes: Shapes) -> str:
    if found:
        return f"{found[0]} keeps its size: {shapes.fixed[found[0]]}."
    in_parts = [f"{part}.{kind}" for part in PARTS for kind in (*KINDS, "layers") if "." in what]
    words = [*KINDS, "layers", *BUDGETS, *in_parts, *shapes.sizes]
    near = difflib.get_close_matches(what, words, n=1)
    known = [k for k in KINDS if any(names(k, axis) for axis in shapes.sizes)]
    return f"This model has no {what!r}; it has {', '.join(known)}, layers." + (
        f" Did you mean {near[0]}?" if near else ""
    )
