"""Differences between runs of the same seed, with Student's intervals over the seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.eval.fewshot import interval


@dataclass(frozen=True)
class SeedDifference:
    """The mean of differences paired by seed, and its 95 % interval by Student's t.

    It covers the true mean in 95 % of the cases if the differences are normal, with three seeds as
    with sixteen. (Percentiles of a bootstrap: in 75 % with three, in 86 % with five.) One seed has
    no interval: `low` and `high` are NaN.
    """

    mean: float
    low: float
    high: float
    wins: int
    """Seeds whose difference is positive."""
    count: int
    """Seeds."""

    @property
    def separated(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def describe(self, unit: str = "") -> str:
        """Return it as text; if values in per cent exceed 100, all are written as factors."""
        values = [v for v in (self.mean, self.low, self.high) if not math.isnan(v)] or [math.nan]
        if unit == "%" and max(map(abs, values)) >= 100:
            mean, *ends = (f"x{1 + value / 100:.3g}" for value in values)
        else:
            mean, *ends = (f"{value:+.1f}" for value in values)
            mean += f" {unit}" if unit else ""
        between = f" [{', '.join(ends)}]" if ends else ""
        return f"{mean}{between}, {self.wins}/{self.count} up"


def compare_seeds(
    ours: Sequence[float], theirs: Sequence[float], *, ratio: bool = False
) -> SeedDifference:
    """Compare two arms seed by seed: ours − theirs, or by how many per cent ours is larger.

    Args:
        ours: One value for each seed.
        theirs: The values of the same seeds.
        ratio: Compare ratios, averaged as logarithms and returned in per cent.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} values are no pairs.")
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.log(a / b) if ratio else a - b
    if not np.isfinite(difference).all():
        return SeedDifference(math.nan, math.nan, math.nan, int((difference > 0).sum()), len(a))
    ends = interval(difference.tolist()) if len(a) > 1 else (math.nan, math.nan)
    values = [float(difference.mean()), *ends]
    if ratio:
        with np.errstate(over="ignore"):
            values = [100 * float(np.expm1(v)) for v in values]
    return SeedDifference(*values, wins=int((difference > 0).sum()), count=len(a))
