"""Candidates learn from their parent, the better ones for longer."""

import math
from collections.abc import Callable, Mapping

from zoo.students.prune.journal import Journal
from zoo.train.hypertrick import stops

Train = Callable[[str, int], float]
"""Trains a candidate for some steps; returns how far it is from its parent then."""


def halve(
    distances: Mapping[str, float], journal: Journal, steps: int, train: Train
) -> dict[str, tuple[int, float]]:
    """Train all candidates for `steps`, the better half anew for twice as many, and so on to one.

    A candidate begins anew in each round, so that its learning rate falls to 0 within the round.
    Minitron (2407.14679) ranks after a short distillation too: ranks change in its first 300 steps.

    Args:
        distances: Of the candidates as they were cut.
        journal: What is known already is not trained again.

    Returns:
        For each candidate the steps of its last round, and its distance after it.
    """
    last = {words: (0, far) for words, far in distances.items()}
    left = list(distances)
    while len(left) > 1:
        for words in left:
            last[words] = steps, _trained(words, steps, journal, train)
        left = sorted(left, key=lambda words: last[words][1])[: (len(left) + 1) // 2]
        steps *= 2
    return last


def hypertrick(
    distances: Mapping[str, float], journal: Journal, steps: int, train: Train
) -> dict[str, tuple[int, float]]:
    """Train candidates one after another, each for twice as many steps again until it stops.

    As many phases as `halve` has rounds, and half of a phase's candidates stop, as expected
    (1902.02725). Arguments and result are those of `halve`.
    """
    last = {words: (0, far) for words, far in distances.items()}
    count = len(distances)
    reported: list[list[float]] = [[] for _ in range(math.ceil(math.log2(max(1, count))))]
    for words in sorted(distances, key=lambda words: distances[words]):
        for phase, found in enumerate(reported):
            far = _trained(words, steps * 2**phase, journal, train)
            last[words] = steps * 2**phase, far
            found.append(far)
            if stops(found, workers=count, phase=phase, rate=0.5):
                break
    return last


def _trained(words: str, steps: int, journal: Journal, train: Train) -> float:
    """Return how far a candidate is after so many steps; train it unless that is known."""
    far = journal.distance(words, steps)
    if far is None:
        far = train(words, steps)
        journal.note(words, steps, far)
    print(f"after {steps} steps  distance {far:.4f}  {words}", flush=True)
    return far
