"""COCO's numbers: equal to the original's, 1 for what is perfect, chance for what is random."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.coco_metric import (
    Prediction,
    coco_metrics,
    coco_results,
    read_results,
    write_results,
)
from zoo.eval.detect.draw import truth_of
from zoo.eval.detect.shapes import write_shapes


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_shapes(folder, train=2, val=30, side=128)
    return open_coco(folder, "val")


def perfect(split):
    found = ((truth_of(image, split, masks=True), image) for image in split.images)
    return [result for one, image in found for result in coco_results(one, image, split)]


def shaken(split, seed=0):
    """Right ones moved about, with random scores, some classes wrong, and false ones."""
    draws = np.random.default_rng(seed)
    results = []
    for image in split.images:
        truth = truth_of(image, split, masks=True)
        for box, label, mask in zip(truth.boxes, truth.labels, truth.masks, strict=True):
            for shift in draws.integers(-9, 10, (4, 2)):
                moved = box + torch.tensor([*shift, *shift])
                turned = mask.roll(tuple(int(x) for x in shift[::-1]), (0, 1))
                wrong = (int(label) + draws.integers(0, 5) // 4) % 3
                scores = torch.tensor([draws.random()])
                one = Prediction(moved[None], scores, torch.tensor([wrong]), turned[None])
                results += coco_results(one, image, split)
    return results


def test_a_planted_detector_scores_one_in_every_number(split):
    values = dict(coco_metrics(split, perfect(split), masks=True))
    assert {"box/AP", "box/AP_small", "box/AP_medium", "mask/AP", "mask/AR100"} <= set(values)
    capped = [n for n in values if n.endswith("AR1")]  # one box an image finds no second object
    assert all(value == pytest.approx(1) for n, value in values.items() if n not in capped)
    assert all(0 < values[n] < 1 for n in capped)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_the_numbers_are_those_of_pycocotools(split, class_agnostic):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed; it is in [dev]")
    how = dict(masks=True, class_agnostic=class_agnostic)
    results = shaken(split)
    fast = dict(coco_metrics(split, results, **how))
    slow = dict(coco_metrics(split, results, **how, metric="pycocotools"))
    assert fast == pytest.approx(slow, abs=1e-12)
    assert 0.05 < fast["box/AP"] < 0.95  # a value that could differ
    assert 0.05 < fast["mask/AP"] < 0.95


def test_the_ap_of_a_class_is_what_pycocotools_says_of_it_alone(split):
    tools = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is in [dev]")
    from pycocotools.coco import COCO

    results = shaken(split)
    ours = dict(coco_metrics(split, results))
    truth = COCO(str(split.file))
    found = truth.loadRes(json.loads(json.dumps(results)))
    for name, category in zip(split.classes, split.category_ids, strict=True):
        run = tools.COCOeval(truth, found, "bbox")
        run.params.catIds = [category]
        run.evaluate()
        run.accumulate()
        run.summarize()
        assert ours[f"box/class/{name}"] == pytest.approx(run.stats[0], abs=1e-9)
    each = [ours[f"box/class/{name}"] for name in split.classes]
    assert len(set(each)) == 3 and ours["box/AP"] == pytest.approx(np.mean(each))
    agnostic = dict(coco_metrics(split, results, class_agnostic=True))
    assert not [name for name in agnostic if "/class/" in name]


def average_precision(right, objects):
    """AP of one class by hand: `right` says of each prediction, best first, whether it is."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
    return sum(envelope[p] for p in places if p < len(right)) / 101


def test_guessed_classes_score_what_chance_says(split):
    """Perfect boxes, each with one of three classes at random, in random order."""
    results = perfect(split)
    truth = np.array([r["category_id"] for r in results])
    draws = np.random.default_rng(0)

    def guess():
        order = draws.permutation(len(truth))
        return order, draws.choice(split.category_ids, len(truth))

    measured, expected = [], []
    for _ in range(8):
        order, classes = guess()
        guessed = [
            dict(results[i], category_id=int(c), score=1 - rank / 1000)
            for rank, (i, c) in enumerate(zip(order, classes, strict=True))
        ]
        measured.append(dict(coco_metrics(split, guessed))["box/AP"])
    for _ in range(300):
        order, classes = guess()
        each = [
            average_precision(truth[order[classes == c]] == c, (truth == c).sum())
            for c in split.category_ids
        ]
        expected.append(np.mean(each))
    assert np.mean(measured) == pytest.approx(np.mean(expected), abs=0.03)
    assert 0.1 < np.mean(measured) < 0.3  # a third of a third, and what interpolation adds


def test_class_agnostic_numbers_forgive_the_class(split):
    wrong = [dict(r, category_id={3: 7, 7: 8, 8: 3}[r["category_id"]]) for r in perfect(split)]
    assert dict(coco_metrics(split, wrong))["box/AP"] < 0.02  # where two objects overlap
    assert dict(coco_metrics(split, wrong, class_agnostic=True))["box/AP"] == pytest.approx(1)


def test_boxes_far_from_any_object_score_nothing(split):
    far = [dict(r, bbox=[r["bbox"][0] + 500, 0, 5, 5]) for r in perfect(split)]
    assert dict(coco_metrics(split, far))["box/AP"] == 0


def test_no_prediction_scores_nothing_in_the_same_numbers(split):
    some = dict(coco_metrics(split, shaken(split), masks=True))
    none = dict(coco_metrics(split, [], masks=True))
    assert set(some) == set(none)
    assert set(none.values()) == {0.0}


def test_the_file_of_predictions_is_read_back_and_by_pycocotools(split, tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    results = shaken(split)
    write_results(results, tmp_path / "predictions.json")
    assert read_results(tmp_path / "predictions.json", split) == json.loads(json.dumps(results))
    there = pycocotools.COCO(str(split.file))
    assert len(there.loadRes(str(tmp_path / "predictions.json")).anns) == len(results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ('{"a": 1}', "is not a list of COCO results"),
        (
            '[{"image_id": 999, "category_id": 3, "score": 1}]',
            "image_id that .* does not have: 999",
        ),
        (
            '[{"image_id": 10, "category_id": 4, "score": 1}]',
            "category_id that .* does not have: 4",
        ),
    ],
)
def test_a_file_of_other_predictions_is_refused(split, tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "p.json", split)


def test_a_split_without_objects_has_no_score(split):
    with pytest.raises(ValueError, match="no object in its 1 images"):
        next(coco_metrics(split.__class__(**{**split.__dict__, "images": split.images[-1:]}), []))
