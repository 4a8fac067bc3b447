import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.plan import Plan
from zoo.experiments.pictures import PictureFeed, Pictures, RandomCrop, read_collection

CPU = torch.device("cpu")


def folder(root, classes, each=4):
    for split in ("train", "val"):
        for number in range(classes):
            place = root / split / f"c{number}"
            place.mkdir(parents=True)
            for i in range(each):
                pixels = np.full((20, 30, 3), 20 * number + i, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def ramp():
    """Two pictures whose pixels say where they are: columns in red, rows in green."""
    line = torch.arange(64, dtype=torch.uint8) * 4
    red, green = line.expand(64, 64), line[:, None].expand(64, 64)
    return torch.stack([red, green, torch.zeros_like(red)]).expand(200, 3, 64, 64)


def test_a_crop_covers_the_share_of_the_picture_that_it_should():
    crop = RandomCrop(size=32, scale=(0.3, 0.6), ratio=(1.0, 1.0))
    out = crop(ramp(), torch.Generator().manual_seed(0)) * 255 / 4  # back to pixels
    wide = (out[:, 0, :, -1] - out[:, 0, :, 0]).mean(1) * 32 / 31 / 64
    tall = (out[:, 1, -1] - out[:, 1, 0]).mean(1) * 32 / 31 / 64
    torch.testing.assert_close(wide, tall, atol=0.03, rtol=0)
    area = wide * tall
    assert 0.27 < area.min() < 0.35 and 0.55 < area.max() < 0.63
    assert out[:, 0].min() < 3 and out[:, 0].max() > 60  # crops reach the borders


def test_a_whole_crop_is_the_picture_and_a_flip_is_its_mirror_image():
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    whole = dict(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    draws = torch.Generator().manual_seed(0)
    torch.testing.assert_close(RandomCrop(**whole)(images, draws), images / 255, atol=1e-4, rtol=0)
    mirrored = RandomCrop(**whole, flip=1.0)(images, draws)
    torch.testing.assert_close(mirrored, (images / 255).flip(-1), atol=1e-4, rtol=0)


def test_a_feed_repeats_itself_from_any_step_and_another_seed_does_not():
    pictures = Pictures(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8))

    def crops(seed, start=0):
        feed = PictureFeed(pictures, RandomCrop(size=8), Plan(8, 4, seed))
        parts = list(feed.batches(start, 4))
        return torch.stack([p.images for p in parts]), torch.cat([p.labels for p in parts])

    first, later, other = crops(1), crops(1, start=3), crops(2)
    torch.testing.assert_close(first[0][3:], later[0], rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])
    assert sorted(first[1][:8].tolist()) == list(range(8))  # an epoch has every picture once
    assert not list(PictureFeed(pictures, RandomCrop(size=8), Plan(8, 4, 1)).batches(4, 4))


def test_the_classes_of_a_second_data_set_come_after_the_first_ones(tmp_path):
    folders = [folder(tmp_path / "a", 2), folder(tmp_path / "b", 3)]
    collection = read_collection(folders, 24, CPU)
    assert collection.classes == 5 and list(collection.probes) == ["a", "b"]
    assert collection.train.labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert collection.probes["b"][0].labels.unique().tolist() == [0, 1, 2]
    assert collection.train.images.shape == (20, 3, 24, 24)


def test_a_limit_takes_pictures_of_all_classes(tmp_path):
    collection = read_collection([folder(tmp_path, 4)], 24, CPU, limit=8)
    assert collection.train.labels.unique().tolist() == [0, 1, 2, 3] and len(collection.train) == 8


def test_pictures_without_classes_are_refused(tmp_path):
    folder(tmp_path, 1)
    with pytest.raises(ValueError, match="has no classes"):
        read_collection([tmp_path], 24, CPU)
