"""The benchmark `detect`: known answers, class lists, pictures, the file of predictions."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from zoo.cli import main
from zoo.eval.detect.benchmark import f1, measure
from zoo.eval.detect.canvas import Samples
from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.coco_metric import Prediction
from zoo.eval.detect.draw import PALETTE, draw, truth_of
from zoo.eval.detect.spec import BackboneSource, Detector, DetectorSpec
from zoo.eval.examples import Example
from zoo.eval.paired import compare
from zoo.eval.registry import Picture
from zoo.eval.results import Record, read, write

CLASSES = ("disc", "square", "triangle")
CPU = torch.device("cpu")


class Planted(Detector):
    """Knows the answers; says them as they are, or somewhere at random."""

    def __init__(self, split, *, guesses=False, classes=CLASSES):
        super().__init__()
        source = BackboneSource(
            name="none", levels=(0,), strides=(16,), mean=(0.5,) * 3, std=(0.5,) * 3
        )
        self.spec = DetectorSpec(kind="mask_rcnn", source=source, classes=classes, size=64)
        self.split, self.guesses = split, guesses

    def predict(self, batch):
        found = [truth_of(self.split.images[i], self.split, masks=True) for i in batch.indices]
        return [self._shaken(one) for one in found] if self.guesses else found

    def _shaken(self, found):
        corner = torch.rand(len(found.boxes), 2) * 40
        return Prediction(
            torch.cat([corner, corner + 8], dim=1),
            torch.rand(len(found.boxes)),
            torch.randint(3, (len(found.boxes),)),
            torch.rand(found.masks.shape) > 0.9,
        )


@pytest.fixture
def val(shapes):
    return open_coco(shapes, "val")


def numbers(found):
    numbers = {name: value for name, value in found if not isinstance(value, Picture | Example)}
    return {n: one if isinstance(one, float) else one.value for n, one in numbers.items()}


def test_a_planted_detector_scores_a_hundred(val):
    found = numbers(measure(Planted(val), val, CPU))
    assert found["detect/box/AP"] == pytest.approx(100)
    assert found["detect/mask/AP"] == pytest.approx(100)


def test_a_detector_that_guesses_scores_next_to_nothing(val):
    found = numbers(measure(Planted(val, guesses=True), val, CPU))
    assert found["detect/box/AP"] < 5
    assert found["detect/mask/AP"] < 5


def test_two_detectors_are_compared_with_intervals_from_their_result_file(val, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    for name, guesses in (("guesses", True), ("knows", False)):
        found = dict(measure(Planted(val, guesses=guesses), val, CPU))
        parts = {n: one for n, one in found.items() if not isinstance(one, float)}
        values = {n: one if isinstance(one, float) else one.value for n, one in found.items()}
        record = Record(target=name, benchmark="detect", values=values, data_hash="x")
        write(out, record, parts, {})
    guesses, knows = read(out)
    rows = {row.measure: row for row in compare([guesses], [knows])}
    for name in ("box/AP", "box/AP50", "mask/AP", "mask/AP50"):
        row = rows[f"detect/{name}"]
        assert row.separated and row.low > 50 and row.images == 4
    assert rows["detect/box/AR100"].low is None
    assert all(row.low in (None, 0) and row.high in (None, 0) for row in compare([knows], [knows]))
    main(["eval", "--compare", f"{out}:guesses", f"{out}:knows"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "detect/box/AP50" in x]
    assert "100.00" in line and "[+" in line


def test_torn_images_are_in_no_number_and_counted(shapes, tmp_path):
    """One is no image at all, which its header says; of another only half is there."""
    shutil.copytree(shapes, tmp_path / "torn")
    files = sorted((tmp_path / "torn" / "val").glob("*.png"))
    files[0].write_bytes(b"no image")
    files[1].write_bytes(files[1].read_bytes()[:-200])
    split, lost = open_coco(tmp_path / "torn", "val"), set()
    found = numbers(measure(Planted(split, guesses=True), split, CPU, unreadable=lost))
    assert lost == {str(file) for file in files[:2]}
    knows = numbers(measure(Planted(split), split, CPU))
    assert knows["detect/box/AP"] == pytest.approx(100) and found["detect/box/AP"] < 50
    for file in files[2:]:
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="3 images in a row are unreadable"):
        numbers(measure(Planted(split), split, CPU))


def test_classes_in_another_order_are_brought_to_the_detectors(val):
    turned = ("triangle", "disc", "square")
    planted = Planted(val.with_classes(turned), classes=turned)
    assert numbers(measure(planted, val, CPU))["detect/box/AP"] == pytest.approx(100)


def test_a_detector_with_classes_can_be_scored_without_them(shapes, val):
    agnostic = open_coco(shapes, "val", class_agnostic=True)
    assert numbers(measure(Planted(val), agnostic, CPU))["detect/box/AP"] == pytest.approx(100)
    turned = Planted(val, classes=("ball", "square", "triangle"))  # other names are no matter
    assert numbers(measure(turned, agnostic, CPU))["detect/box/AP"] == pytest.approx(100)


def test_other_classes_are_refused_and_a_class_agnostic_detector_where_classes_count(val):
    with pytest.raises(ValueError, match="only there: disc; not there: ball"):
        next(measure(Planted(val, classes=("ball", "square", "triangle")), val, CPU))
    planted = Planted(val)
    planted.spec = replace(planted.spec, class_agnostic=True)
    with pytest.raises(ValueError, match="class-agnostic"):
        next(measure(planted, val, CPU))


def test_predictions_are_written_and_pictures_drawn(val, tmp_path):
    found = list(measure(Planted(val), val, CPU, pictures=2, out=tmp_path / "p.json"))
    pictures = [value for _, value in found if isinstance(value, Picture)]
    assert [p.pixels.dtype for p in pictures] == [np.uint8] * 2
    image = val.images[0]
    assert pictures[0].pixels.shape == (image.rows, 2 * image.cols + 8, 3)
    written = json.loads((tmp_path / "p.json").read_text())
    assert {r["category_id"] for r in written} <= set(val.category_ids)
    assert all(isinstance(r["segmentation"]["counts"], str) for r in written)


def test_f1_counts_each_object_once_and_only_its_own_class():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    truth = Prediction(box, torch.ones(2), torch.tensor([0, 1]))
    assert f1(truth, truth) == 1
    twice = Prediction(box[[0, 0]], torch.tensor([0.9, 0.8]), torch.tensor([0, 0]))
    assert f1(twice, truth) == pytest.approx(2 / 4)  # the second is false, one object is missed
    wrong = Prediction(box, torch.ones(2), torch.tensor([1, 0]))
    assert f1(wrong, truth) == 0
    unsure = Prediction(box, torch.tensor([0.9, 0.4]), torch.tensor([0, 1]))
    assert f1(unsure, truth) == pytest.approx(2 / 3)
    nothing = Prediction(box[:0], torch.ones(0), torch.zeros(0, dtype=torch.long))
    assert f1(nothing, truth) == 0 and np.isnan(f1(nothing, nothing))


def test_only_sure_boxes_are_drawn_in_the_colour_of_their_class():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 14.0, 34.0, 34.0], [1.0, 1.0, 9.0, 9.0]])
    found = Prediction(boxes, torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
    drawn = draw(image, found, CLASSES)
    colour = [int(PALETTE[1][i : i + 2], 16) for i in (1, 3, 5)]
    assert drawn[:, 34, 20].tolist() == colour
    assert drawn[:, 9, 5].sum() == 0
    assert image.sum() == 0


def test_samples_and_truth_agree_on_labels(val):
    samples = Samples(val, 64, masks=False)
    for index, image in enumerate(val.images):
        assert torch.equal(
            samples[index, False].truths[0].labels, truth_of(image, val, masks=False).labels
        )
