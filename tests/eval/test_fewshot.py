"""Few-shot: what is drawn, and the interval of several draws."""

import math
from pathlib import Path

import pytest
import torch

from zoo.eval.extract import Extracted
from zoo.eval.fewshot import FewshotSettings, drawn, fewshot, interval
from zoo.eval.registry import Scores, Subject


def subject(noise, rows=60, classes=3):
    centres = 3 * torch.eye(classes)

    def side(seed):
        draws = torch.Generator().manual_seed(seed)
        labels = torch.arange(rows) % classes
        x = centres[labels] + noise * torch.randn(rows, classes, generator=draws)
        return Extracted(x, labels, [str(i) for i in range(rows)])

    return Subject(name="planted", made=None, read=lambda _: (side(0), side(1)))


def measured(noise, **settings):
    return dict(fewshot(subject(noise), Path(), FewshotSettings(**settings)))


def test_planted_classes_are_found_with_one_image_and_pure_noise_is_chance():
    sure = measured(0.01, shots=(1,), draws=3)
    assert sure["fewshot/1/top1"].value == sure["fewshot/1/low"] == 100
    lost = measured(300.0, shots=(5,), draws=5)["fewshot/5/top1"].value
    assert 15 < lost < 52


def test_more_images_help_and_the_interval_holds_the_mean():
    found = measured(1.5, shots=(1, 10), draws=5)
    one, ten = (found[f"fewshot/{n}/top1"] for n in (1, 10))
    assert isinstance(one, Scores) and ten.value > one.value + 5
    assert found["fewshot/1/low"] < one.value < found["fewshot/1/high"]


def test_each_draw_takes_that_many_of_every_class_and_other_seeds_take_others():
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(3))
    rows = drawn(labels, 4, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [4] * 5
    assert len(set(rows.tolist())) == 20
    assert torch.equal(rows, drawn(labels, 4, seed=0))
    assert set(rows.tolist()) != set(drawn(labels, 4, seed=1).tolist())


def test_the_interval_is_students_and_one_value_has_none():
    low, high = interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2) · 1 / sqrt(3)
    assert (low, high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert interval([1.0]) == (-math.inf, math.inf)


def test_more_shots_than_a_class_has_are_left_out_or_refused():
    assert set(measured(0.1, shots=(1, 21), draws=1)) == {"fewshot/1/top1"}
    with pytest.raises(ValueError, match="smallest class has 20 images"):
        measured(0.1, shots=(21,))
    with pytest.raises(ValueError, match="each is 1 or more"):
        measured(0.1, shots=(0,))
