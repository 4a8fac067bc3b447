import math

import numpy as np
import pytest

from zoo.experiments.intervals import compare_seeds


def test_the_interval_covers_the_true_difference_about_as_often_as_it_should():
    draws = np.random.default_rng(0)
    inside = 0
    for _ in range(150):
        theirs = draws.normal(5, 2, 16)
        found = compare_seeds(theirs + draws.normal(0.3, 0.5, 16), theirs)
        inside += found.low <= 0.3 <= found.high
    assert 0.86 <= inside / 150 <= 0.99


def test_a_ratio_is_written_in_per_cent_and_large_ones_as_factors():
    found = compare_seeds([2.2, 1.1], [2.0, 1.0], ratio=True)
    assert found.mean == pytest.approx(10) and found.separated and found.wins == 2
    assert found.describe("%") == "+10.0 % [+10.0, +10.0], 2/2 up"
    assert compare_seeds([8.0], [2.0], ratio=True).describe("%").startswith("x4 [x4, x4]")


def test_an_interval_around_zero_is_not_separated():
    assert not compare_seeds([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]).separated


def test_a_value_that_is_not_finite_leaves_no_interval():
    found = compare_seeds([math.nan, 1.0], [1.0, 0.5], ratio=True)
    assert math.isnan(found.low) and not found.separated and found.wins == 1


def test_unequal_numbers_are_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        compare_seeds([1.0], [1.0, 2.0])
