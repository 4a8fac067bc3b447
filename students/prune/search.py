"""Candidates under a budget: which widths and depths a library can build at a wanted cost.

A *knob* is something that can be made smaller: a kind of axis, in a stage of its own or everywhere,
or the layers of a list. A direction says how much each knob gives; along it, the largest model
within the budget is found. Of all these, candidates are taken that lie far from each other.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from zoo.axes import Shapes
from zoo.students.prune.plan import KINDS, PARTS, VISION, Plan, names, part_of, stage_of

LOWEST = 1 / 8
"""No width, and no number of layers, falls below this share."""
MOST_LEVELS = 128
DIRECTIONS = 64
"""Directions that are tried, half of them drawn."""
CLOSE = 0.9
"""A candidate that uses less of the budget than this share of what the best one does is dropped."""

Fits = Callable[[Plan], bool]
"""Tells whether a library has what a plan makes."""


class Knob(NamedTuple):
    """Words of a plan that are turned together, and the shares that they can have; 1.0 is last."""

    words: tuple[str, ...]
    levels: tuple[float, ...]


Setting = tuple[int, ...]
"""A level of each knob, by its place."""


def find_knobs(shapes: Shapes, fixed: Plan, fits: Fits, parts: Sequence[str] = ()) -> list[Knob]:
    """Find what may vary: what the library can build alone, or together with the stream.

    Args:
        fixed: What the user has said; it stays as it is.
        parts: Of a model of images and text, those that may be cut; by default both.
    """
    if not any(part_of(axis) == VISION and names("stream", axis) for axis in shapes.sizes):
        return _knobs(shapes, fixed, fits)
    return [
        knob
        for part in parts or PARTS
        for knob in _knobs(shapes, fixed, fits, part=part, prefix=f"{part}.")
    ]


def _knobs(shapes: Shapes, fixed: Plan, fits: Fits, part: str = "", prefix: str = "") -> list[Knob]:
    """Find what may vary of a whole model, or of a part."""
    staged = any(_is_staged(a) and (not part or part_of(a) == part) for a in shapes.sizes)
    refused, knobs = [], []
    for kind in (prefix + kind for kind in KINDS):
        if not _free(kind, shapes, fixed):
            continue
        alone = [_knob((f"{kind}@{i}",), shapes, fixed) for i in _stages_of(kind, shapes)]
        found = [knob for knob in alone if knob and fits(_probe(knob))] if staged else []
        if not found:
            knob = _knob((kind,), shapes, fixed)
            found = [knob] if knob and fits(_probe(knob)) else []
            refused += [kind] if knob and not found else []
        knobs += found
    stream = f"{prefix}stream"
    if stream in refused:  # where one number sets both
        for kind in (prefix + kind for kind in KINDS):
            knob = _knob((stream, kind), shapes, fixed) if _free(kind, shapes, fixed) else None
            if kind != stream and knob and fits(_probe(knob)):
                knobs = [other for other in knobs if kind not in other.words] + [knob]
                break
    return knobs + _layer_knobs(shapes, fixed, fits, part, prefix)


def _layer_knobs(
    shapes: Shapes, fixed: Plan, fits: Fits, part: str = "", prefix: str = ""
) -> list[Knob]:
    lists = [entry.path for entry in shapes.layers if not part or part_of(entry.path) == part]
    if fixed.layers is not None or part in fixed.parts or not lists:
        return []
    lengths = {path: shapes.num_layers(path) for path in lists}
    if len({stage_of(path) for path in lengths}) == 1:
        word, most = f"{prefix}layers", max(lengths.values())
        return [Knob((word,), _shares(most))] * (most > 1)
    knobs = [
        Knob((f"{prefix}layers@{stage}",), _shares(length))
        for path, length in lengths.items()
        if length > 1 and (stage := stage_of(path)) is not None and stage not in fixed.stages
    ]
    return [knob for knob in knobs if fits(_probe(knob))]


def _is_staged(axis: str) -> bool:
    """Tell whether an axis is the stream of a stage, or of one tower of several."""
    return names("stream", axis) and re.search(r"C\d+$|\.\d+:C", axis) is not None


def _stages_of(kind: str, shapes: Shapes) -> list[int]:
    found = {stage_of(axis) for axis in shapes.sizes if names(kind, axis)}
    return sorted(number for number in found if number is not None)


def _free(kind: str, shapes: Shapes, fixed: Plan) -> list[str]:
    """Return the axes of a kind that neither the table nor the user has fixed."""
    return [
        axis
        for axis in shapes.sizes
        if names(kind, axis)
        and axis not in shapes.fixed
        and not any(names(word, axis) for word in fixed.axes)
    ]


def _knob(words: tuple[str, ...], shapes: Shapes, fixed: Plan) -> Knob | None:
    """Make a knob whose levels give whole numbers of units, or None if there is but one."""
    if not all(_free(word, shapes, fixed) for word in words):
        return None
    touched = Plan(dict.fromkeys(words, 1e-9)).sizes(shapes)  # those that follow, too
    common = math.gcd(*(shapes.sizes[axis] for axis in touched))
    levels = _shares(common) if common > 1 else _shares(16)  # rounded; the library judges
    return Knob(words, levels) if touched and len(levels) > 1 else None


def _shares(number: int) -> tuple[float, ...]:
    """Return the shares that keep whole units of `number`; multiples of 8 of them where it has."""
    unit = 8 if number >= 64 and number % 8 == 0 else 1
    while number % unit or number // unit > MOST_LEVELS:
        unit += 8 if unit >= 8 else 1
    steps = number // unit
    return tuple(k / steps for k in range(1, steps + 1) if k / steps >= LOWEST)


def _probe(knob: Knob) -> Plan:
    """Return a plan with a knob near three quarters."""
    level = min(range(len(knob.levels) - 1), key=lambda i: abs(knob.levels[i] - 0.75))
    return plan_of([knob], (level,), Plan({}))


def plan_of(knobs: Sequence[Knob], setting: Setting, fixed: Plan) -> Plan:
    """Return what a setting of the knobs keeps; what the user has fixed comes last, and wins."""
    axes: dict[str, float | int] = {}
    layers, stages, parts = fixed.layers, dict(fixed.stages), dict(fixed.parts)
    for knob, level in zip(knobs, setting, strict=True):
        share = knob.levels[level]
        if share == 1.0:
            continue
        for word in knob.words:
            kind, _, stage = word.partition("@")
            part, _, what = kind.rpartition(".")
            if what != "layers":
                axes[word] = share
            elif stage:
                stages[int(stage)] = share
            elif part:
                parts[part] = share
            else:
                layers = share
    return Plan({**axes, **fixed.axes}, layers, stages=stages, parts=parts)


def words_of(plan: Plan) -> str:
    """Write a plan as `--to` takes it."""
    words = {**plan.axes, **{f"layers@{stage}": n for stage, n in plan.stages.items()}}
    words |= {f"{part}.layers": n for part, n in plan.parts.items()}
    words |= {} if plan.layers is None else {"layers": plan.layers}
    return ",".join(f"{what}={_written(amount)}" for what, amount in words.items())


def _written(amount: float | int) -> str:
    return str(amount) if isinstance(amount, int) else str(round(amount, 5))


# Settings at the budget


def directions(knobs: Sequence[Knob], seed: int) -> Iterator[tuple[float, ...]]:
    """Yield how much each knob gives, 0 to 1: all alike, every set of kinds, then draws."""
    kinds = list(dict.fromkeys(_kind(knob) for knob in knobs))
    sets = [
        chosen
        for number in range(len(kinds), 0, -1)
        for chosen in itertools.combinations(kinds, number)
    ]
    parts = {kind.partition(".")[0] for kind in kinds if "." in kind}
    if len(parts) > 1:  # each part alone, after all together
        alone = [tuple(k for k in kinds if k.startswith(f"{part}.")) for part in sorted(parts)]
        sets[1:1] = alone
    for chosen in sets[: DIRECTIONS // 2]:
        yield tuple(float(_kind(knob) in chosen) for knob in knobs)
    draws = random.Random(seed)
    for _ in range(DIRECTIONS // 2):
        yield tuple(draws.random() for _ in knobs)


def _kind(knob: Knob) -> str:
    return knob.words[-1].partition("@")[0]


def settle(
    knobs: Sequence[Knob], direction: Sequence[float], use: Callable[[Setting], float]
) -> Setting | None:
    """Find the largest model along a direction within the budget, or None if there is none.

    Afterwards the knob with the finest levels takes what is left.
    """

    def at(t: float) -> Setting:
        shares = (
            1 - t * give * (1 - knob.levels[0]) for knob, give in zip(knobs, direction, strict=True)
        )
        return tuple(
            _nearest(knob.levels, share) for knob, share in zip(knobs, shares, strict=True)
        )

    within, over = 1.0, 0.0
    if use(at(within)) > 1:
        return None
    for _ in range(12):
        middle = (within + over) / 2
        within, over = (middle, over) if use(at(middle)) <= 1 else (within, middle)
    found = at(within)
    free = [i for i, give in enumerate(direction) if give]
    finest = max(free, key=lambda i: len(knobs[i].levels))
    found = _filled(knobs, found, finest, use)
    for i in free:  # a coarse knob may take a step back, if the finest one can pay for it
        if i != finest and found[i] + 2 < len(knobs[i].levels):
            tried = (*found[:i], found[i] + 1, *found[i + 1 :])
            tried = _filled(knobs, (*tried[:finest], 0, *tried[finest + 1 :]), finest, use)
            found = max(found, tried, key=lambda s: use(s) if use(s) <= 1 else 0.0)
    return found


def _filled(
    knobs: Sequence[Knob], setting: Setting, knob: int, use: Callable[[Setting], float]
) -> Setting:
    """Turn one knob up as far as the budget allows."""
    low, high = setting[knob], len(knobs[knob].levels)
    while high - low > 1:
        middle = (low + high) // 2
        tried = (*setting[:knob], middle, *setting[knob + 1 :])
        low, high = (middle, high) if use(tried) <= 1 else (low, middle)
    return (*setting[:knob], low, *setting[knob + 1 :])


def _nearest(levels: Sequence[float], share: float) -> int:
    return min(range(len(levels)), key=lambda i: abs(levels[i] - share))


def apart(knobs: Sequence[Knob], one: Setting, other: Setting) -> float:
    """Return the largest ratio of a knob's shares in two settings, as a logarithm."""
    return max(
        abs(math.log(knob.levels[a] / knob.levels[b]))
        for knob, a, b in zip(knobs, one, other, strict=True)
    )


def spread(
    knobs: Sequence[Knob], settings: Sequence[Setting], nearest: float = 0.05
) -> Iterator[Setting]:
    """Yield settings, each time the one that is farthest from all before; the first comes first.

    Those within 5 % of one before are left out.
    """
    left = list(dict.fromkeys(settings))
    chosen: list[Setting] = []
    while left:
        far = [min((apart(knobs, s, c) for c in chosen), default=math.inf) for s in left]
        best = max(range(len(left)), key=far.__getitem__)
        if far[best] < nearest:
            return
        chosen.append(left.pop(best))
        yield chosen[-1]
