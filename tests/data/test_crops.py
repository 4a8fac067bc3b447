"""Crops and windows: image and mask stay together, draws do not depend on workers."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.crops import CropFeed, Crops, CropSpec, whole_images
from zoo.data.plan import Plan
from zoo.eval.dense.windows import sliding, starts
from zoo.features import Batch

CPU, PLAN = torch.device("cpu"), Plan(5, 2, seed=0)


class Coded:
    """Images whose red says the class of each pixel: 0 to 3, in blocks of 20 pixels."""

    def __init__(self, count=5, size=(80, 60)):
        draws = np.random.default_rng(0)
        blocks = draws.integers(4, size=(count, size[1] // 20, size[0] // 20))
        self.masks = blocks.repeat(20, axis=1).repeat(20, axis=2).astype(np.uint8)

    def __len__(self):
        return len(self.masks)

    def key(self, index):
        return str(index)

    def image(self, index):
        red = self.masks[index] * 60
        return Image.fromarray(np.stack([red, red, red], axis=-1))

    def target(self, index):
        return self.masks[index]


def test_pixels_and_masks_are_cut_mirrored_and_enlarged_alike():
    coded = Coded()
    for position in range(20):
        pixels, mask, _ = Crops(coded, CropSpec(side=48), PLAN)[position, position % 5]
        assert pixels.shape == (3, 48, 48) and mask.shape == (48, 48)
        known = mask != 255
        red = pixels[0].astype(int)
        agree = np.abs(red - mask.astype(int) * 60)[known] < 31
        assert agree.mean() > 0.9  # all but the blurred edges of the blocks
        assert (red[~known] == 124).all()


def test_small_images_are_padded_with_pixels_that_are_not_scored():
    pixels, mask, _ = Crops(Coded(), CropSpec(side=64, scale=(0.5, 0.5), fill=1.0), PLAN)[0, 0]
    # the short side of 60 becomes 32, the long one of 80 becomes 43; one end is empty
    assert (mask != 255).sum() == 32 * 43
    assert (pixels[:, mask == 255] == 124).all()


def test_one_class_does_not_fill_a_crop_if_another_place_can_be_had():
    coded = Coded(count=1)
    coded.masks[:] = 0
    coded.masks[:, :, :20] = 1
    crop = CropSpec(side=30, scale=(1.0, 1.0), flip=0.0)
    full = [Crops(coded, crop, PLAN)[i, 0][1] for i in range(30)]
    spread = [max((m == 0).mean(), (m == 1).mean()) < 0.75 for m in full]
    loose = CropSpec(side=30, scale=(1.0, 1.0), flip=0.0, fill=1.0)
    any_place = [Crops(coded, loose, PLAN)[i, 0][1] for i in range(30)]
    before = [max((m == 0).mean(), (m == 1).mean()) < 0.75 for m in any_place]
    assert sum(spread) > sum(before)


def crops_of(start=0, *, steps=6, **more):
    feed = CropFeed(Coded(), CropSpec(side=32), Plan(5, 2, seed=1), CPU, **more)
    return feed, list(feed.batches(start, steps))


def test_a_feed_that_begins_later_gives_the_crops_that_a_whole_one_gives_there():
    feed, whole = crops_of()
    _, rest = crops_of(4)
    assert len(whole) == 6 and len(rest) == 2
    for mine, theirs in zip(rest, whole[4:], strict=True):
        assert torch.equal(mine.images.images, theirs.images.images)
        assert torch.equal(mine.target, theirs.target)
    assert not torch.equal(whole[0].target, whole[5].target)
    assert feed.counts(0)["any loss"] == 2 and len(feed.keys(3)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside torch's threads
def test_workers_change_nothing():
    alone, many = (crops_of(workers=n)[1] for n in (0, 2))
    for (x, y), (v, w) in zip(alone, many, strict=True):
        assert torch.equal(x.images, v.images) and torch.equal(y, w)


def test_whole_images_come_as_they_are():
    coded = Coded(count=2)
    for i, pixels, mask in whole_images(coded):
        assert torch.equal(mask[0], torch.from_numpy(coded.masks[i]))
        assert torch.equal(pixels[0, 0], mask[0] * 60)


def test_windows_cover_an_edge_and_the_last_ends_with_it():
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1200, 512, 341) == [0, 341, 682, 688]
    assert starts(853, 512, 341) == [0, 341]


@pytest.mark.parametrize("size", [(32, 32), (32, 75), (75, 32)])
def test_an_answer_that_looks_at_single_pixels_does_not_notice_the_windows(size):
    image = torch.rand(1, 3, *size)
    got = sliding(lambda b: b.images * 2 + 1, image, side=32, stride=20, batch=2)
    torch.testing.assert_close(got, image * 2 + 1)


def test_windows_give_an_answer_at_the_images_own_size():
    seen = []

    def answer(batch: Batch):
        seen.append(tuple(batch.images.shape))
        return batch.images[:, :1]

    got = sliding(answer, torch.rand(1, 3, 50, 100), side=32, stride=32, batch=1)
    assert got.shape == (1, 1, 50, 100)
    assert seen == [(1, 3, 32, 32)] * 2
