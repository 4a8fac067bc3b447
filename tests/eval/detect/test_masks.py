"""Masks in the three forms of COCO files."""

import numpy as np
import pytest

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

from zoo.eval.detect.masks import decode, encode, problem_of

SQUARE = [[2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]]


def square():
    mask = np.zeros((8, 10), bool)
    mask[1:4, 2:6] = True
    return mask


def plain_runs(mask):
    """Count by hand, column by column, zeros first."""
    counts, last = [0], 0
    for pixel in mask.T.ravel().astype(int):
        if pixel != last:
            counts.append(0)
            last = pixel
        counts[-1] += 1
    return dict(size=list(mask.shape), counts=counts)


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask():
    (text,) = encode(square()[None])
    assert isinstance(text["counts"], str)
    for form in (SQUARE, text, plain_runs(square())):
        assert problem_of(form, 8, 10) is None
        np.testing.assert_array_equal(decode(form, 8, 10), square())


def test_a_mask_is_drawn_at_the_size_that_is_asked_for():
    for form in (SQUARE, plain_runs(square())):
        twice = decode(form, 8, 10, size=(16, 20))
        np.testing.assert_array_equal(twice, square().repeat(2, 0).repeat(2, 1))


def test_an_object_without_mask_is_empty():
    assert decode([], 4, 5).sum() == 0
    assert encode(np.zeros((0, 4, 5), bool)) == []


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("polygon", "a str where"),
        ([3.0, 4.0], "not a list of numbers"),
        ([[1.0, 2.0, 3.0, 4.0]], "of 4 numbers"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]], "no number"),
        (dict(size=[8, 9], counts=[72]), "has 8 rows and 10 columns"),
        (dict(size=[8, 10], counts=[50]), "over 50 pixels; the image has 80"),
        (dict(size=[8, 10], counts=None), "neither text nor a list"),
    ],
)
def test_a_malformed_mask_is_told_from_a_good_one(form, message):
    assert message in (problem_of(form, 8, 10) or "")
