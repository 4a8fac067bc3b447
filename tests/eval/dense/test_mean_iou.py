"""Mean IoU: scikit-learn's numbers, a brute-force count, and what must hold for any masks."""

import numpy as np
import pytest
import torch

from zoo.eval.dense.mean_iou import Confusion

CLASSES = ("sky", "road", "car", "tree")


def masks(count, classes=4, seed=0, ignore=0.1):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (count, 9, 11), generator=generator)
    guess = torch.where(
        torch.rand(truth.shape, generator=generator) < 0.6,
        truth,
        torch.randint(classes, truth.shape, generator=generator),
    )
    nothing = torch.rand(truth.shape, generator=generator) < ignore
    return torch.where(nothing, 255, truth), guess


def measured(truth, guess, classes=CLASSES):
    confusion = Confusion(classes)
    for i in range(len(truth)):
        confusion.add(truth[i], guess[i], str(i))
    return {
        name: value if isinstance(value, float) else value.value
        for name, value in confusion.values("segment")
    }


def test_the_numbers_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extra [train]")
    truth, guess = masks(5)
    got = measured(truth, guess)
    known = truth != 255
    y, x = truth[known].numpy(), guess[known].numpy()
    want = 100 * metrics.jaccard_score(y, x, average=None)
    assert [got[f"segment/class/{name}"] for name in CLASSES] == pytest.approx(want.tolist())
    assert got["segment/miou"] == pytest.approx(want.mean())
    assert got["segment/pixel_accuracy"] == pytest.approx(100 * metrics.accuracy_score(y, x))
    balanced = 100 * metrics.balanced_accuracy_score(y, x)
    assert got["segment/mean_accuracy"] == pytest.approx(balanced)


def test_the_numbers_are_those_of_a_count_pixel_by_pixel():
    truth, guess = masks(3, seed=4)
    both, either = np.zeros(4), np.zeros(4)
    for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if t == 255:
            continue
        both[t] += t == g
        either[t] += 1
        either[g] += t != g
    assert measured(truth, guess)["segment/miou"] == pytest.approx(100 * (both / either).mean())


def test_a_perfect_guess_is_100_and_pixels_without_a_class_do_not_count():
    truth, _ = masks(2, ignore=0.3)
    got = measured(truth, torch.where(truth == 255, 1, truth))
    assert set(got.values()) == {100.0}


def test_a_random_guess_scores_what_chance_says():
    generator = torch.Generator().manual_seed(0)
    truth, guess = torch.randint(4, (2, 30, 100, 100), generator=generator)
    got = measured(truth, guess)
    # p of four equal classes: both 1/16, either 2/4 - 1/16
    assert got["segment/miou"] == pytest.approx(100 / 7, abs=0.2)
    assert got["segment/pixel_accuracy"] == pytest.approx(25, abs=0.3)


def test_a_class_that_nobody_names_is_left_out_and_one_named_in_vain_is_zero():
    truth, guess = torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.long)
    guess[0, 0, 0] = 2
    got = measured(truth, guess)
    assert got["segment/class/sky"] == 75 and got["segment/class/car"] == 0
    assert "segment/class/road" not in got
    assert got["segment/miou"] == 37.5


def test_sums_run_over_images_before_anything_is_divided():
    truth = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 1, 1]]])
    guess = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    assert measured(truth, guess)["segment/miou"] == pytest.approx(100 * (4 / 5 + 3 / 4) / 2)


def test_masks_of_two_shapes_no_images_and_no_classes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\) and the guess \(2, 3\)"):
        Confusion(CLASSES).add(torch.zeros(2, 2).long(), torch.zeros(2, 3).long(), "a")
    with pytest.raises(ValueError, match="No image was counted"):
        Confusion(CLASSES).sums()
    with pytest.raises(ValueError, match="There are 0 classes"):
        Confusion(())
