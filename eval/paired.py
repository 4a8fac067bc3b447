"""Compare two models on the same images: is the difference larger than chance would make it?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.registry import Parts, Scores, ratio_of_sums
from zoo.eval.results import NEUTRAL, Record, flat, latest

DRAWS = 10_000
RANKINGS = 200
"""Draws for an average precision, each of which goes through all predictions again."""
COUNTS_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The second model minus the first, in points, with the 95 % interval of bootstrap draws."""

    measure: str
    data: str = ""
    """The data set's name."""
    how: str = ""
    """In what the two measurements differ (size, precision, seed), and which of several it is."""
    first: float
    second: float
    low: float | None = None
    high: float | None = None
    images: int | None = None
    """`None` if the scores of single images are not known; then there is no interval either."""

    @property
    def difference(self) -> float:
        """The second minus the first."""
        return self.second - self.first

    @property
    def separated(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def describe(self) -> tuple[str, str, str, str, str]:
        """Return the texts of a table's row: measure, both numbers, difference, interval."""
        digits = 2 if max(abs(self.first), abs(self.second)) < 1e5 else 0
        interval = "–"
        if self.low is not None and self.high is not None:
            apart = "" if self.separated else ", not separated"
            interval = f"[{self.low:+.2f}, {self.high:+.2f}] over {self.images} images{apart}"
        first, second = (f"{x:,.{digits}f}" for x in (self.first, self.second))
        measure = " · ".join(text for text in (self.measure, self.data, self.how) if text)
        return measure, first, second, f"{self.difference:+,.{digits}f}", interval


def paired_bootstrap(
    first: Parts, second: Parts, *, draws: int | None = None
) -> tuple[float, float]:
    """Return the 95 % interval of the second number minus the first, over the choice of images.

    A draw resamples the images with replacement, the same ones for both models, and computes both
    numbers from them. The interval is made of percentiles of the differences (Efron & Tibshirani,
    13.3).

    Args:
        draws: `DRAWS` by default, for average precisions `RANKINGS`.

    Raises:
        ValueError: the two were not measured on the same images, or are not of one kind.
    """
    order = _order(first.keys, second.keys)
    chance = np.random.default_rng(0)
    if isinstance(first, Scores) and isinstance(second, Scores):
        found = _differences(first, second, order, draws or DRAWS, chance)
    elif isinstance(first, AveragePrecision) and isinstance(second, AveragePrecision):
        images = len(order)
        taken = chance.multinomial(images, np.full(images, 1 / images), size=draws or RANKINGS)
        found = second.over(taken[:, np.argsort(order)]) - first.over(taken)
    else:
        raise ValueError("The two numbers are of different kinds; measure both with one version.")
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def _differences(
    first: Scores, second: Scores, order: np.ndarray, draws: int, chance: np.random.Generator
) -> np.ndarray:
    """Return the difference in each draw.

    Images with equal scores of both models are one kind, so a draw is one multinomial over the
    kinds. A million images that are right or wrong have only four kinds.
    """
    sides = [*first.sums(), *(side[order] for side in second.sums())]
    widths = np.cumsum([side.shape[1] for side in sides])[:-1]
    kinds, count = np.unique(np.concatenate(sides, axis=1), axis=0, return_counts=True)
    images, found = int(count.sum()), []
    at_once = max(1, COUNTS_AT_ONCE // len(kinds))
    for start in range(0, draws, at_once):
        taken = chance.multinomial(images, count / images, size=min(at_once, draws - start))
        top_a, bottom_a, top_b, bottom_b = np.split(taken @ kinds, widths, axis=1)
        found.append(ratio_of_sums(top_b, bottom_b) - ratio_of_sums(top_a, bottom_a))
    return np.concatenate(found)


def _order(ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
    """Return the index of each of the first model's images among the second's."""
    ours, theirs = list(ours), list(theirs)
    if ours == theirs:
        return np.arange(len(ours))
    where = {key: i for i, key in enumerate(theirs)}
    shared = sum(key in where for key in ours)
    if shared != len(ours) or len(ours) != len(theirs) or len(where) != len(theirs):
        raise ValueError(
            f"The two models were measured on {len(ours)} and {len(theirs)} images, of which "
            f"{shared} are the same; measure both on one data set."
        )
    return np.array([where[key] for key in ours])


class Pairing(NamedTuple):
    """The records of two models that can be compared, and those that cannot."""

    pairs: list[tuple[Record, Record]]
    first: list[Record]
    """Records of the first model that the second has no counterpart of."""
    second: list[Record]

    def left_out(self, first: str, second: str) -> list[str]:
        """Return a sentence on each record that stands alone."""
        sides = ((first, self.first), (second, self.second))
        return [f"only {name} has {about(r)}" for name, alone in sides for r in alone]


def about(record: Record) -> str:
    """Return benchmark, data, settings, size, precision and seed of a record as text."""
    words = [record.benchmark]
    words += [f"on {Path(record.data).name}"] if record.data else []
    settings = ", ".join(f"{name}={value}" for name, value in record.settings.items())
    own = [f"({settings})"] if settings else []
    side = [f"{record.size} px"] if record.size else []
    return (
        " ".join(words + own) + ": " + ", ".join([*side, record.precision, f"seed {record.seed}"])
    )


def pair(first: Sequence[Record], second: Sequence[Record]) -> Pairing:
    """Pair the measurements of two models: benchmark, data and settings must be equal.

    Of several such, those with the same conditions (size, precision, of speeds the machine) and
    seed are a pair. One that is left on each side is a pair too: models may be measured each at its
    own size. What then differs stands in the row of the table.

    Raises:
        ValueError: one side has two records that differ in nothing but their weights.
    """
    ours, theirs = latest(first), latest(second)
    for side in (ours, theirs):
        _refuse_several(side)
    exact = {_exact(record): record for record in theirs}
    pairs = [(record, exact[_exact(record)]) for record in ours if _exact(record) in exact]
    used = {id(record) for both in pairs for record in both}
    alone = [[r for r in side if id(r) not in used] for side in (ours, theirs)]
    for record in list(alone[0]):
        left = [[r for r in side if r.case == record.case] for side in alone]
        if [len(side) for side in left] == [1, 1]:
            pairs.append((record, left[1][0]))
            alone = [[r for r in side if r.case != record.case] for side in alone]
    order = {id(record): place for place, record in enumerate(ours)}
    pairs.sort(key=lambda both: order[id(both[0])])
    return Pairing(pairs, alone[0], alone[1])


def _refuse_several(records: Sequence[Record]) -> None:
    known: dict[tuple[Any, ...], Record] = {}
    for record in records:
        other = known.setdefault(_exact(record), record)
        if other is not record:
            both = " and ".join(str(r.weights_hash or r.features) for r in (other, record))
            raise ValueError(
                f"{about(record)} of {record.target} was measured of two models, {both} (their "
                "weights); take one of the lines out."
            )


def _exact(record: Record) -> tuple[Any, ...]:
    return *record.case, json.dumps(_conditions(record), sort_keys=True), record.seed


def _conditions(record: Record) -> dict[str, Any]:
    """Return the conditions that two models can share: of stored features not their folder."""
    return record.conditions | {"stored features": bool(record.features)}


FORMS = {"size": "{} px", "precision": "{}", "machine": "{}"}
"""How a condition is said; any other with its name."""


def _differing(ours: Record, other: Record) -> str:
    """Return in what two paired records differ, besides the model."""
    sides = [_conditions(record) | {"seed": record.seed} for record in (ours, other)]
    return ", ".join(
        " against ".join(FORMS.get(name, f"{name} {{}}").format(s.get(name)) for s in sides)
        for name in dict.fromkeys(name for side in sides for name in side)
        if sides[0].get(name) != sides[1].get(name)
    )


def _how(ours: Record, other: Record, pairs: Sequence[tuple[Record, Record]]) -> str:
    """Return what tells a row from the others of its benchmark and data, and its two sides apart.

    These are settings that differ between the rows, and conditions that do so between the sides,
    or else between the rows.
    """
    alike = [r for r, _ in pairs if (r.benchmark, r.dataset) == (ours.benchmark, ours.dataset)]
    kept = [{n: x for n, x in flat(r.settings).items() if n not in NEUTRAL} for r in alike]
    own = flat(ours.settings)
    names = [n for n in dict.fromkeys(n for k in kept for n in k)
             if any(k.get(n) != own.get(n) for k in kept)]  # fmt: skip
    words = [f"{name}={own.get(name, '–')}" for name in names]
    several = sum(r.case == ours.case for r in alike) > 1
    shared = f"{ours.size} px, {ours.precision}, seed {ours.seed}" if several else ""
    return ", ".join(text for text in (*words, _differing(ours, other) or shared) if text)


def _data_name(record: Record, pairs: Sequence[tuple[Record, Record]]) -> str:
    """Return the name of the folder, with the hash if another data set is called so too."""
    name = Path(record.data).name if record.data else ""
    called = {r.dataset for r, _ in pairs if r.data and Path(r.data).name == name}
    return f"{name} ({str(record.dataset)[:6]})" if len(called) > 1 else name


def compare(first: Sequence[Record], second: Sequence[Record]) -> list[PairedDifference]:
    """Compare two models on every benchmark that both have on the same data with the same settings.

    See `pair`, which also says what only one of them has.

    Raises:
        ValueError: there is no such benchmark, or scores of single images cannot be read or paired.
    """
    pairs = pair(first, second).pairs
    if not pairs:
        sides = " and ".join(
            ", ".join(sorted({f"{r.benchmark} on {r.data}" for r in side}))
            for side in (first, second)
        )
        raise ValueError(
            f"The two share no benchmark with the same data and settings; they have {sides}."
        )
    rows = []
    for ours, other in pairs:
        scores, others = ours.scores(), other.scores()
        data, how = _data_name(ours, pairs), _how(ours, other, pairs)
        for name, value in ours.values.items():
            against = other.values.get(name)
            if value is None or against is None:
                continue
            ends: tuple[float | None, float | None] = (None, None)
            if name in scores and name in others:
                ends = paired_bootstrap(scores[name], others[name])
            rows.append(
                PairedDifference(
                    measure=name,
                    data=data,
                    how=how,
                    first=value,
                    second=against,
                    low=ends[0],
                    high=ends[1],
                    images=len(scores[name].keys) if ends[0] is not None else None,
                )
            )
    return rows
