"""Successive halving: candidates learn from their parent, the better half for longer."""

from collections.abc import Callable, Mapping

from zoo.students.prune.journal import Journal

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
            far = journal.distance(words, steps)
            if far is None:
                far = train(words, steps)
                journal.note(words, steps, far)
            last[words] = steps, far
            print(f"after {steps} steps  distance {far:.4f}  {words}", flush=True)
        left = sorted(left, key=lambda words: last[words][1])[: (len(left) + 1) // 2]
        steps *= 2
    return last
