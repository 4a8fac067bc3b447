"""The images on which all models are shown: which they are, and what is kept of them."""

import numpy as np
from PIL import Image

from zoo.eval.examples import Example, chosen
from zoo.eval.results import Record, read, write


def test_images_are_evenly_spread_and_the_same_whatever_is_predicted():
    assert chosen(8) == [1, 3, 5, 7] and chosen(3) == [0, 1, 2] and chosen(0) == []
    spread = np.diff(chosen(1000))
    assert (spread == 250).all() and chosen(1000)[0] == 125


def test_what_is_kept_comes_back_small_and_with_its_words(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (90, 1440, 3), dtype=np.uint8)
    classes = np.zeros((90, 1440, 3), np.uint8)
    classes[:, 720:] = (9, 200, 7)
    words = Example("a/1.png", noise, "dog", "cat", right=False)
    painted = Example("2.png", noise, classes, classes, "70 %", legend=[("tree", (9, 200, 7))])
    record = Record(target="m", benchmark="knn", values={"knn/top1": 1.0})
    write(tmp_path / "r.jsonl", record, {}, {}, [words, painted])
    (found,) = read(tmp_path / "r.jsonl")
    first, second = found.examples
    assert (first["truth"], first["prediction"], first["right"]) == ("dog", "cat", False)
    assert second["legend"] == [["tree", [9, 200, 7]]] and second["score"] == "70 %"
    truth = np.asarray(Image.open(tmp_path / second["truth"]["file"]))
    assert max(truth.shape) <= 360
    colours = {tuple(pixel) for pixel in truth.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), (9, 200, 7)}  # no colour that is no class's
