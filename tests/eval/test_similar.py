"""Retrieval by an image, corruptions, and folds of a small set."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.eval.corruptions import NAMES, corrupt
from zoo.eval.extract import Extracted
from zoo.eval.knn import FoldPredictions, folds_of, predict_knn
from zoo.eval.similar import average_precisions


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    g = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(50, 8, generator=g), torch.randn(20, 8, generator=g)
    labels, truth = torch.arange(50) % 5, torch.arange(20) % 6  # no image has the class 5
    found, first = average_precisions(gallery, labels, queries, truth)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=-1)
    for i in range(20):
        right = (labels == truth[i]).numpy()
        if not right.any():
            assert first[i] == 0
            continue
        assert found[i] == pytest.approx(average_precision_score(right, cosine[i].numpy()))
        order = cosine[i].argsort(descending=True)
        assert first[i] == 1 + right[order.numpy()].argmax()


def test_of_equally_similar_images_the_wrong_ones_come_first():
    same = torch.ones(4, 3)
    found, first = average_precisions(same, torch.tensor([0, 0, 1, 1]), same[:1], torch.tensor([0]))
    assert first[0] == 3 and found[0] == pytest.approx((1 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_grows_with_its_severity_and_follows_from_the_seed(name):
    draws = np.random.default_rng(0)
    small = Image.fromarray(draws.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    image = small.resize((64, 48), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(float)
    far = [
        np.abs(np.asarray(corrupt(image, name, severity, 1)).astype(float) - pixels).mean()
        for severity in (1, 3, 5)
    ]
    assert 0 < far[0] < far[1] < far[2]
    again = [np.asarray(corrupt(image, name, 3, seed)) for seed in (1, 1, 2)]
    assert (again[0] == again[1]).all()
    assert (again[0] == again[2]).all() == ("noise" not in name)
    with pytest.raises(ValueError, match="no corruption 'fog' of severity 1"):
        corrupt(image, "fog", 1, 0)


def test_noise_has_the_deviation_of_the_paper():
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    noise = np.asarray(corrupt(grey, "gaussian_noise", 1, 0)) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.02)
    shot = np.asarray(corrupt(grey, "shot_noise", 1, 0)) / 255
    assert shot.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.05)


def test_folds_test_each_image_once_with_every_class_in_each_bank():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    x = torch.randn(30, 6, generator=g) + 3 * torch.eye(6)[labels]
    keys = [str(i) for i in range(30)]
    train, val = (Extracted(x[at], labels[at], keys[at]) for at in (slice(20), slice(20, None)))
    answers, rights, seen = FoldPredictions(), [], []
    for bank, queries in folds_of(train, val, 5, 0):
        assert len(queries.keys) == 6 and not set(bank.keys) & set(queries.keys)
        assert bank.labels.bincount().tolist() == [8, 8, 8]
        predicted = predict_knn(bank.summaries, bank.labels, queries.summaries, queries.labels, k=3)
        answers.add(predicted, queries)
        rights.append(100 * (predicted == queries.labels).double().mean().item())
        seen += queries.keys
    assert sorted(seen, key=int) == keys
    found = dict(answers.found("knn", None, None, draw=False))
    assert found["knn/top1"].value == pytest.approx(np.mean(rights)) and np.mean(rights) > 60
    # classes are equally large, so their mean is the same
    assert found["knn/mean_per_class"].value == pytest.approx(np.mean(rights))
    (alone,) = folds_of(train, val, 0, 0)
    assert alone == (train, val)
    with pytest.raises(ValueError, match="1 folds of 30 images"):
        next(folds_of(train, val, 1, 0))
