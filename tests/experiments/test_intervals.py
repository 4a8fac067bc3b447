import math

import numpy as np
import pytest

from zoo.experiments.intervals import compare_seeds


@pytest.mark.parametrize("seeds", [3, 5, 16])
def test_the_interval_covers_the_true_difference_in_95_per_cent_of_experiments(seeds):
    """3,000 experiments: 95 % has a standard error of 0.4 points."""
    chance, inside = np.random.default_rng(seeds), 0
    for _ in range(3000):
        theirs = chance.normal(5, 2, seeds)
        found = compare_seeds(theirs + chance.normal(0.3, 0.5, seeds), theirs)
        inside += found.low <= 0.3 <= found.high
    assert 0.94 <= inside / 3000 <= 0.96


def test_a_ratio_is_written_in_per_cent_and_large_ones_as_factors():
    found = compare_seeds([2.2, 1.1, 4.4], [2.0, 1.0, 4.0], ratio=True)
    assert found.mean == pytest.approx(10) and found.separated and found.wins == 3
    assert found.describe("%") == "+10.0 % [+10.0, +10.0], 3/3 up"
    assert compare_seeds([8.0, 4.0], [2.0, 1.0], ratio=True).describe("%") == "x4 [x4, x4], 2/2 up"


def test_one_seed_has_no_interval():
    found = compare_seeds([8.0], [2.0], ratio=True)
    assert not found.separated and found.describe("%") == "x4, 1/1 up"


def test_an_interval_around_zero_is_not_separated():
    assert not compare_seeds([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]).separated


def test_a_value_that_is_not_finite_leaves_no_interval():
    found = compare_seeds([math.nan, 1.0], [1.0, 0.5], ratio=True)
    assert math.isnan(found.low) and not found.separated and found.wins == 1


def test_unequal_numbers_are_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        compare_seeds([1.0], [1.0, 2.0])
