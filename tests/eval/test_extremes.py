"""The worst and the best images are those that a sort of all scores says, and legends name them."""

import math

import numpy as np
import pytest

from zoo.eval.extremes import Extremes, with_legend
from zoo.eval.registry import Picture


@pytest.mark.parametrize(("count", "total"), [(4, 50), (5, 50), (1, 9), (6, 4), (0, 5)])
def test_the_kept_ones_are_the_ends_of_a_sort(count, total):
    scores = np.random.default_rng(count).permutation(total).astype(float)
    keep, drawn = Extremes(count, "luck"), []
    for i, score in enumerate(scores):
        keep.offer(score, str(i), lambda i=i: drawn.append(i) or Picture(np.zeros(1), str(i)))
    found = dict(keep.found())
    order = [str(i) for i in scores.argsort()]
    half = count - count // 2
    assert list(found) == list(dict.fromkeys([*order[:half], *order[::-1][: count // 2]]))
    if count:
        assert f"worst 1 of {total} by luck (0.0 %)" in found[order[0]].caption
    assert len(drawn) == len(found)  # the others are not drawn at all


def test_an_image_without_a_score_is_passed_over_and_equal_scores_are_two_images():
    keep = Extremes(2, "luck")
    for name, score in (("a", math.nan), ("b", 1.0), ("c", 1.0), ("d", 1.0)):
        keep.offer(score, name, lambda name=name: Picture(np.zeros(1), name))
    assert [name for name, _ in keep.found()] == ["b", "d"]


def test_a_legend_stands_below_and_wraps_where_the_image_is_narrow():
    image = np.full((20, 120, 3), 7, np.uint8)
    entries = [(f"class {i}", (10 * i, 200, 30)) for i in range(4)]
    drawn = with_legend(image, entries)
    assert np.array_equal(drawn[:20], image) and drawn.shape[1] == 120
    below = drawn[20:].reshape(-1, 3)
    for _, colour in entries:
        assert (below == colour).all(axis=1).sum() > 100
    assert len(drawn) - 20 > len(with_legend(image, entries[:1])) - 20
