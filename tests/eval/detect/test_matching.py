"""What COCO's precisions are made of: equal to the library's, and to repeated images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.coco_metric import (
    Prediction,
    _run,
    _truth,
    coco_metrics,
    coco_results,
    coco_scores,
)
from zoo.eval.detect.draw import truth_of
from zoo.eval.detect.matching import MEASURES, average_precisions
from zoo.eval.detect.shapes import write_shapes
from zoo.eval.paired import paired_bootstrap


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Objects that are told to be of all three sizes, and a fifth of them crowds."""
    folder = tmp_path_factory.mktemp("coco")
    write_shapes(folder, train=2, val=40, side=220)
    found = open_coco(folder, "val")
    changed = {
        image: [
            dict(a, iscrowd=int(a["id"] % 5 == 0), area=a["area"] * (0.2, 1, 3)[a["id"] % 3])
            for a in annotations
        ]
        for image, annotations in found.annotations.items()
    }
    return replace(found, annotations=changed)


def shaken(split, spread=14, seed=0):
    """Right ones moved about, with random scores, some twice, some classes wrong."""
    draws = np.random.default_rng(seed)
    results = []
    for image in split.images:
        truth = truth_of(image, split, masks=True)
        for box, label, mask in zip(truth.boxes, truth.labels, truth.masks, strict=True):
            for shift in draws.integers(-spread, spread + 1, (4, 2)):
                moved = box + torch.tensor([*shift, *shift])
                turned = mask.roll(tuple(int(x) for x in shift[::-1]), (0, 1))
                wrong = (int(label) + draws.integers(0, 5) // 4) % 3
                scores = torch.tensor([draws.random()])
                one = Prediction(moved[None], scores, torch.tensor([wrong]), turned[None])
                results += coco_results(one, image, split)
    return results


def precisions(split, results):
    found = coco_scores(split, results, masks=True)
    return {name: one for name, one in found if isinstance(one, AveragePrecision)}


def test_with_weights_of_one_the_numbers_are_the_librarys(split):
    results = shaken(split)
    theirs = dict(coco_metrics(split, results, masks=True))
    ours = precisions(split, results)
    assert set(ours) == {f"{kind}/{name}" for kind in ("box", "mask") for name in MEASURES}
    for name, one in ours.items():
        assert one.value == pytest.approx(100 * theirs[name], abs=1e-9)
        assert 3 < one.value < 97  # a value that could differ


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_class_agnostic_numbers_are_the_librarys_too(split, kind):
    run = _run(_truth(split, True), shaken(split), kind, "faster", True)
    ours = average_precisions(run, {i.id: i.path.name for i in split.images})
    for name, theirs in zip(MEASURES, run.stats[:6], strict=True):
        assert ours[name].value == pytest.approx(100 * theirs, abs=1e-9)


def test_a_draw_is_a_data_set_in_which_its_images_stand_again_and_again(split):
    results = shaken(split)
    ours = precisions(split, results)
    for weights in np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=2):
        images, annotations, repeated = [], {}, []
        for image, count in zip(split.images, weights, strict=True):
            for _ in range(count):
                again = len(images) + 1
                images.append(replace(image, id=again))
                annotations[again] = [dict(a, image_id=again) for a in split.annotations[image.id]]
                repeated += [dict(r, image_id=again) for r in results if r["image_id"] == image.id]
        literal = replace(split, images=tuple(images), annotations=annotations)
        theirs = dict(coco_metrics(literal, repeated, masks=True))
        for name, one in ours.items():
            assert one.over(weights[None])[0] == pytest.approx(100 * theirs[name], abs=1e-9)
        assert theirs["box/AP"] != pytest.approx(ours["box/AP"].value / 100, abs=1e-4)


def test_more_than_a_hundred_predictions_of_an_image_and_equal_scores_are_taken_as_there(split):
    few = replace(split, images=split.images[:3])
    some = (r for seed in range(40) for r in shaken(few, seed=seed))
    results = [dict(r, score=round(r["score"], 1)) for r in some]
    theirs = dict(coco_metrics(few, results))
    ours = dict(coco_scores(few, results))
    assert max(np.bincount([r["image_id"] for r in results])) > 300
    assert ours["box/AP"].value == pytest.approx(100 * theirs["box/AP"], abs=1e-9)


def test_a_better_detector_is_separated_also_from_one_that_finds_nothing(split):
    good, bad = precisions(split, shaken(split, 8)), precisions(split, shaken(split, 24))
    nothing = precisions(split, [])
    assert set(nothing) == set(good)
    for name in ("box/AP", "box/AP50", "mask/AP", "mask/AP50"):
        assert paired_bootstrap(bad[name], good[name])[0] > 0
        assert paired_bootstrap(good[name], good[name]) == (0, 0)
        low, high = paired_bootstrap(good[name], nothing[name])
        assert low < -good[name].value < high < 0
