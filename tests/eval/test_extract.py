"""Extraction: one row an image, whatever the model gives."""

import pytest
import torch

from zoo.eval.extract import extract
from zoo.features import Batch, Features


def batches(*sizes, labels=True):
    for i, size in enumerate(sizes):
        images = torch.rand(size, 3, 8, 8)
        keys = [f"{i}/{j}" for j in range(size)]
        yield Batch(images, keys, torch.arange(size) if labels else None)


def corner(batch):
    return Features(batch.images[:, :, 0, 0], None)


def test_the_rows_follow_the_batches_in_float32_and_can_be_trained_on():
    given = list(batches(3, 2))
    got = extract(lambda b: Features(corner(b).summary.bfloat16(), None), given)
    want = torch.cat([b.images[:, :, 0, 0] for b in given]).bfloat16().float()
    torch.testing.assert_close(got.summaries, want, rtol=0, atol=0)
    assert got.labels.tolist() == [0, 1, 2, 0, 1]
    assert got.keys == ["0/0", "0/1", "0/2", "1/0", "1/1"]
    assert not got.summaries.is_inference()


def test_the_mean_of_the_map_stands_in_for_a_summary():
    given = list(batches(2))
    got = extract(lambda b: Features(None, b.images.permute(0, 2, 3, 1)), given)
    torch.testing.assert_close(got.summaries, given[0].images.mean(dim=(2, 3)))


def test_images_without_labels_give_none():
    assert extract(corner, batches(2, 2, labels=False)).labels is None


def test_no_batches_and_half_labelled_batches_are_refused():
    with pytest.raises(ValueError, match="there was no batch"):
        extract(corner, [])
    with pytest.raises(ValueError, match="1 of 2 batches"):
        extract(corner, [*batches(2), *batches(2, labels=False)])
