"""Average precision over weighted images, by hand."""

import numpy as np
import pytest

from zoo.eval.average_precision import RECALLS, AveragePrecision
from zoo.eval.paired import paired_bootstrap

KEYS = [f"{i}.png" for i in range(60)]


def drawn(share, seed=0, classes=3, thresholds=2):
    """Two objects an image and class, and six predictions, of which a share is right."""
    chance = np.random.default_rng(seed)
    label, image = np.indices((classes, 6 * len(KEYS))).reshape(2, -1)
    image = chance.permuted(image.reshape(classes, -1) % len(KEYS), axis=1).ravel()
    right = chance.random((len(label), thresholds)) < share
    counted = right | (chance.random(right.shape) < 0.9)
    objects = np.full((len(KEYS), classes), 6, np.uint16)
    return AveragePrecision(KEYS, image, label, right, counted, objects)


def by_hand(some, copies):
    """Literal copies of every prediction, one threshold and class at a time."""
    values = []
    for label in range(some.objects.shape[1]):
        count = (some.objects[:, label] * copies).sum()
        for t in range(some.right.shape[1]):
            chosen = (some.label == label) & some.counted[:, t]
            right = np.repeat(some.right[chosen, t], copies[some.image[chosen]])
            hits = np.cumsum(right)
            precision = hits / np.arange(1, len(right) + 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            places = np.searchsorted(hits / count, RECALLS)
            values.append(sum(best[p] for p in places if p < len(best)) / len(RECALLS))
    return 100 * np.mean(values)


def test_a_weight_counts_as_so_many_copies_of_the_image():
    some = drawn(0.4)
    copies = np.random.default_rng(1).integers(0, 4, (5, len(KEYS)))
    assert some.value == pytest.approx(by_hand(some, np.ones(len(KEYS), int)), abs=1e-9)
    assert some.over(copies) == pytest.approx([by_hand(some, row) for row in copies], abs=1e-9)


def test_classes_without_objects_in_a_draw_are_left_out_and_none_at_all_is_no_number():
    some = drawn(0.4)
    some.objects[1:, 2] = 0
    some.right[(some.label == 2) & (some.image > 0)] = False
    without = np.arange(len(KEYS)) > 0
    rest = some.label < 2
    fewer = some._replace(
        image=some.image[rest],
        label=some.label[rest],
        right=some.right[rest],
        counted=some.counted[rest],
        objects=some.objects[:, :2],
    )
    assert some.over(without[None]) == pytest.approx(fewer.over(without[None]), abs=1e-12)
    assert np.isnan(some.over(np.zeros((1, len(KEYS))))).all()


def test_no_prediction_is_worth_nothing():
    none = drawn(0.4)
    none = AveragePrecision(KEYS, *(part[:0] for part in none[1:5]), none.objects)
    assert none.value == 0


def test_a_model_against_itself_differs_by_nothing_whatever_the_order_of_images():
    some = drawn(0.4)
    order = np.random.default_rng(1).permutation(len(KEYS))
    again = some._replace(
        keys=[KEYS[i] for i in order],
        image=np.argsort(order)[some.image],
        objects=some.objects[order],
    )
    assert paired_bootstrap(some, some) == (0, 0)
    assert paired_bootstrap(some, again) == (0, 0)


def test_a_better_model_is_separated_and_one_that_is_as_good_is_not():
    low, high = paired_bootstrap(drawn(0.3), drawn(0.5, seed=1))
    assert 0 < low < drawn(0.5, seed=1).value - drawn(0.3).value < high
    low, high = paired_bootstrap(drawn(0.4), drawn(0.4, seed=1))
    assert low < 0 < high


def test_the_interval_is_that_of_scipy():
    from scipy.stats import bootstrap

    a, b = drawn(0.35), drawn(0.4, seed=1)
    low, high = paired_bootstrap(a, b, draws=400)

    def difference(rows, axis):
        weights = np.stack([np.bincount(row, minlength=len(KEYS)) for row in np.atleast_2d(rows)])
        return (b.over(weights) - a.over(weights)).reshape(rows.shape[:-1])

    theirs = bootstrap(
        (np.arange(len(KEYS)),),
        difference,
        vectorized=True,
        method="percentile",
        n_resamples=400,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert (low, high) == (pytest.approx(theirs.low, abs=0.7), pytest.approx(theirs.high, abs=0.7))
