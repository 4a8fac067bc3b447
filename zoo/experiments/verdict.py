"""The rule by which differences over seeds count, fixed before anything ran."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RULE = (
    "An effect counts when its sign is the same in all seeds and its mean exceeds twice the "
    "standard deviation of the differences over seeds (three seeds or more). Written before any "
    "run; what fails it is shown all the same."
)


def judge_gaps(gaps: Sequence[float]) -> dict[str, Any]:
    """Apply the rule to differences, seed by seed: below 0, ours is better."""
    mean = float(np.mean(gaps))
    deviation = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else float("nan")
    same = all(gap < 0 for gap in gaps) or all(gap > 0 for gap in gaps)
    counts = len(gaps) >= 3 and same and abs(mean) > 2 * deviation
    verdict = "not told apart" if not counts else "holds" if mean < 0 else "the reverse holds"
    if len(gaps) < 3:
        verdict = "too few seeds"
    return dict(mean=mean, deviation=deviation, verdict=verdict)


def spread(numbers: Sequence[float], digits: int = 4) -> str:
    """Return mean ± deviation as text, - for none."""
    if not numbers:
        return "-"
    deviation = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{deviation}"
