"""The confusion matrix and the balanced accuracy are scikit-learn's, in files and in a picture."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from zoo.commands.evaluate.run import evaluate
from zoo.eval.confusion import DARK, PAPER, balanced, confusion, drawn
from zoo.eval.extract import Extracted
from zoo.eval.knn import measure
from zoo.eval.registry import Scores, Subject
from zoo.eval.results import read
from zoo.eval.settings import KnnSettings
from zoo.eval.subject import EvalRequest


@pytest.fixture
def answers():
    draws = np.random.default_rng(0)
    truth = draws.choice(5, 300, p=(0.5, 0.2, 0.15, 0.1, 0.05))
    return truth, np.where(draws.random(300) < 0.6, truth, draws.integers(0, 5, 300))


def test_counts_and_balanced_accuracy_are_those_of_scikit_learn(answers):
    truth, predicted = answers
    assert np.array_equal(confusion(truth, predicted, 5), confusion_matrix(truth, predicted))
    keys = [str(i) for i in range(300)]
    ours = balanced(Scores(keys, (truth == predicted).astype(np.uint8)), truth)
    assert ours.value == pytest.approx(100 * balanced_accuracy_score(truth, predicted), abs=1e-9)
    assert abs(ours.value - 100 * (truth == predicted).mean()) > 0.5  # the two could be confused


def test_the_picture_is_dark_on_a_perfect_diagonal_and_names_the_worst_mistake(answers):
    names = ["ant", "bee", "cat", "dog", "eel"]
    perfect = drawn(10 * np.eye(5, dtype=int), names, "knn")
    cell = 640 // 5
    pixels = perfect.pixels[-5 * cell :, -5 * cell :]
    assert np.all(pixels[cell // 2, cell // 2] == DARK)
    assert np.all(pixels[cell // 2, cell + cell // 2] == PAPER)
    counts = np.eye(5, dtype=int) * 10
    counts[2] = 0, 0, 4, 6, 0
    shown = drawn(counts, names, "knn")
    assert "cat for dog, 60%" in shown.caption
    down, across = 2 * cell + cell // 2, 3 * cell + cell // 2  # row of the truth, column predicted
    dark = shown.pixels[-5 * cell :, -5 * cell :]
    assert dark[down, across].sum() < dark[across, down].sum()
    assert list(shown.table[3]) == ["cat", "0", "0", "4", "6", "0"]


def test_each_name_stands_beside_its_row_and_above_its_column():
    for place in range(4):
        names = ["" if i != place else "MMMM" for i in range(4)]
        pixels = drawn(np.eye(4, dtype=int), names, "knn").pixels
        cell, edge = 160, len(pixels) - 640
        for head in (pixels[:edge, edge:], pixels[edge:, :edge].swapaxes(0, 1)):
            ink = [(head[:, i * cell : (i + 1) * cell] < 128).any() for i in range(4)]
            assert ink == [i == place for i in range(4)]


def test_every_image_of_all_folds_is_in_the_matrix(answers):
    truth, _ = answers
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    features[torch.arange(300), torch.from_numpy(truth)] += 2
    sides = [
        Extracted(features[at], torch.from_numpy(truth[at]), [str(i) for i in at])
        for at in (np.arange(200), np.arange(200, 300))
    ]

    class Images:
        classes = ("a", "b", "c", "d", "e")

        def pixels(self, keys):
            return dict.fromkeys(keys, np.zeros((2, 2, 3), np.uint8))

    subject = Subject(name="x", made=None, open=lambda *_: Images())
    subject.known["data"] = tuple(sides)
    values = list(measure(subject, "data", KnnSettings(folds=4, confusion=True)))
    found = dict(values)
    shown = [value for name, value in values if name == "knn/example"]
    assert [e.key for e in shown] == sorted(map(str, range(300)))[37::75]
    assert all(e.right == (e.truth == e.prediction) for e in shown)
    counts = np.array([row[1:] for row in found["knn/confusion"].table[1:]], int)
    assert counts.sum(axis=1).tolist() == np.bincount(truth).tolist()
    assert 100 * counts.trace() / 300 == pytest.approx(found["knn/top1"].value)


def test_the_command_writes_picture_and_counts_beside_the_result(tmp_path):
    draws = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        for name in ("one", "two"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.png")
    out = tmp_path / "r.jsonl"
    settings = {"knn": KnnSettings(k=3, confusion=True)}
    data = {"knn": (tmp_path / "data",)}
    request = EvalRequest(on=("knn",), data=data, settings=settings, size=32, out=out)
    evaluate("test_resnet", request, show=False)
    (record,) = read(out)
    (picture,) = record.pictures
    with (tmp_path / picture["file"]).with_suffix(".csv").open() as file:
        rows = list(csv.reader(file))
    counts = np.array([row[1:] for row in rows[1:]], int)
    assert rows[0][1:] == ["one", "two"] and counts.sum(axis=1).tolist() == [3, 3]
    assert 100 * counts.trace() / 6 == pytest.approx(record.values["knn/top1"])
