"""Differences between runs of the same seed, with bootstrap intervals over the seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
"""Bootstrap samples."""


@dataclass(frozen=True)
class SeedDifference:
    """The mean of differences paired by seed, and the interval of 95 % of its bootstrap samples.

    With few seeds a percentile interval is too narrow (with five it covers about 85 %).
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
        values = (self.mean, self.low, self.high)
        if unit == "%" and max(map(abs, values)) >= 100:
            mean, low, high = (f"x{1 + value / 100:.3g}" for value in values)
        else:
            mean, low, high = (f"{value:+.1f}" for value in values)
            mean += f" {unit}" if unit else ""
        return f"{mean} [{low}, {high}], {self.wins}/{self.count} up"


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
    draws = np.random.default_rng(0).integers(0, len(a), (DRAWS, len(a)))
    low, high = np.percentile(difference[draws].mean(axis=1), [2.5, 97.5])
    values = [float(difference.mean()), float(low), float(high)]
    if ratio:
        values = [100 * math.expm1(v) for v in values]
    return SeedDifference(*values, wins=int((difference > 0).sum()), count=len(a))
