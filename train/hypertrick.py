"""HyperTrick: candidates stop early, and nobody waits for the others (1902.02725).

Each worker trains one candidate through phases of equal length and reports its result after each.
Of W0 workers, (1 - r)^p are to go on after p phases. The first (1 - √r) W0 (1 - r)^p that finish
phase p go on whatever they found; each later one stops if it is among the worst √r of those that
have reported, so that √r √r = r of a phase's workers stop, as expected. Successive halving waits
until a round is over, which costs time where candidates are not equally fast.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.pruners import BasePruner  # pyright: ignore[reportMissingImports]


def stops(reported: Sequence[float], *, workers: int, phase: int, rate: float) -> bool:
    """Tell whether a worker stops after a phase, by what has been reported for it.

    Args:
        reported: Losses after this phase in the order in which they came; its own is the last.
        workers: W0, candidates in all.
        phase: p, from 0.
        rate: r, the share of a phase's workers that is to stop.
    """
    own, share = reported[-1], math.sqrt(rate)
    if math.isnan(own):
        return True
    if len(reported) <= (1 - share) * workers * (1 - rate) ** phase:
        return False
    better = sum(other < own for other in reported)
    return better >= (1 - share) * len(reported)


def hypertrick_pruner(workers: int, *, rate: float = 0.25) -> "BasePruner":
    """Return HyperTrick as a pruner of Optuna: trials report once a phase.

    Args:
        workers: Trials that the study will have.
        rate: Share of a phase's trials that is to stop.

    Raises:
        ValueError: Optuna is missing, or a number is out of its range.
    """
    if workers < 1 or not 0 < rate < 1:
        raise ValueError(f"There are {workers} workers and a rate of {rate:g}; give 1 or more of "
                         "them, and a rate between 0 and 1.")  # fmt: skip
    try:
        from optuna.pruners import BasePruner  # pyright: ignore[reportMissingImports]
        from optuna.study import StudyDirection  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError("Optuna is missing: pip install optuna.") from error

    class HyperTrickPruner(BasePruner):
        """The phase of a trial is the number of reports before its last one."""

        def prune(self, study: Any, trial: Any) -> bool:
            step = trial.last_step
            if step is None:
                return False
            sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
            others = (t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
            found = [t.intermediate_values[step] for t in others if step in t.intermediate_values]
            reported = [sign * value for value in (*found, trial.intermediate_values[step])]
            phase = sum(earlier < step for earlier in trial.intermediate_values)
            return stops(reported, workers=workers, phase=phase, rate=rate)

    return HyperTrickPruner()
