"""Canvases: where images lie on them, what becomes of their objects."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.eval.detect.canvas import Samples, batches, fit, on_canvas, place
from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.draw import truth_of


@pytest.fixture
def samples(shapes):
    return Samples(open_coco(shapes, "train"), 128, masks=True)


def test_the_longer_side_becomes_the_canvas():
    assert fit(480, 640, 320) == (240, 320)
    assert fit(640, 480, 320) == (320, 240)
    assert fit(3, 3000, 32) == (1, 32)


def test_an_image_lies_in_the_upper_left_and_the_rest_is_nothing():
    canvas, size = place(Image.new("RGB", (40, 20), (255, 255, 255)), 64)
    assert size == (32, 64)
    assert (canvas[:, :32] == 255).all()
    assert (canvas[:, 32:] == 0).all()


def test_sixteen_bits_keep_their_brightness():
    deep = Image.fromarray(np.full((8, 8), 32896, np.uint16))
    assert (place(deep, 32)[0][:, :32] == 128).all()


def test_a_camera_that_was_turned_is_heeded_for_photographs_alone():
    image = Image.new("RGB", (40, 20))
    image.getexif()[274] = 6  # turned by a quarter
    assert on_canvas([image], 32).originals == ((40, 20),)


def test_the_empty_canvas_is_zero_after_normalising(samples):
    batch = samples[0, False]
    pixels = batch.normalised(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.2, 0.2]))
    rows, cols = batch.sizes[0]
    assert batch.covered()[0, :rows, :cols].all()
    assert batch.covered().sum() == rows * cols
    assert (pixels * ~batch.covered()[:, None]).abs().sum() == 0
    assert pixels.abs().sum() > 0


def test_boxes_and_masks_grow_with_the_image(samples):
    split = samples.split
    for index, image in enumerate(split.images):
        (truth,) = samples[index, False].truths
        there = truth_of(image, split, masks=True)
        scale = 128 / max(image.rows, image.cols)
        torch.testing.assert_close(truth.boxes, there.boxes * scale, atol=0.6, rtol=0)
        assert truth.masks is not None and there.masks is not None
        areas = there.masks.sum(dim=(1, 2)) * scale**2
        torch.testing.assert_close(truth.masks.sum(dim=(1, 2)).float(), areas, rtol=0.15, atol=4)


def test_masks_lie_in_their_boxes_also_when_mirrored(samples):
    for mirrored in (False, True):
        (truth,) = samples[0, mirrored].truths
        for box, mask in zip(truth.boxes, truth.masks, strict=True):
            rows, cols = mask.nonzero().T
            found = torch.stack([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
            torch.testing.assert_close(found.float(), box, atol=2.0, rtol=0)


def test_mirroring_twice_changes_nothing(samples):
    straight, mirrored = samples[0, False], samples[0, True]
    cols = straight.sizes[0][1]
    assert not torch.equal(straight.images, mirrored.images)
    back = mirrored.images[..., :cols].flip(-1)
    assert torch.equal(back, straight.images[..., :cols])
    assert torch.equal(straight.images[..., cols:], mirrored.images[..., cols:])


def test_an_image_without_objects_gives_empty_tensors(samples):
    (truth,) = samples[len(samples) - 1, False].truths
    assert truth.boxes.shape == (0, 4)
    assert truth.masks.shape == (0, 128, 128)


def test_kept_images_are_those_that_are_read(shapes, samples):
    kept = Samples(samples.split, 128, masks=True, keep=True)
    for _ in range(2):
        assert torch.equal(kept[1, True].images, samples[1, True].images)


@pytest.mark.slow
def test_workers_give_the_same_batches(samples):
    sampler = [[(0, False), (1, True)], [(2, True), (3, False)]]
    for ours, theirs in zip(
        batches(samples, sampler), batches(samples, sampler, workers=2), strict=True
    ):
        assert torch.equal(ours.images, theirs.images)
        assert ours.indices == theirs.indices
