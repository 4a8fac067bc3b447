"""Compare two models on the same images: is the difference larger than chance would make it?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.registry import Parts, Scores, ratio_of_sums
from zoo.eval.results import Record

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
        measure = f"{self.measure} · {self.data}" if self.data else self.measure
        return measure, first, second, f"{self.difference:+,.{digits}f}", interval


def paired_bootstrap(
    first: Parts, second: Parts, *, draws: int | None = None, seed: int = 0
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
    chance = np.random.default_rng(seed)
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


def compare(first: Sequence[Record], second: Sequence[Record]) -> list[PairedDifference]:
    """Compare two models on every benchmark that both have on the same data with the same settings.

    Raises:
        ValueError: there is no such benchmark, or scores of single images cannot be read or paired.
    """
    theirs = {record.case: record for record in second}
    pairs = [(record, theirs[record.case]) for record in first if record.case in theirs]
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
                    data=Path(ours.data).name if ours.data else "",
                    first=value,
                    second=against,
                    low=ends[0],
                    high=ends[1],
                    images=len(scores[name].keys) if ends[0] is not None else None,
                )
            )
    return rows
