import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.sources import open_source
from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.teachers.pretext import NETWORKS, SIZE
from zoo.train import pretext
from zoo.train.pretext import pretext_weights


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretext, "STEPS", 10)
    for number, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng([number, i]).integers(0, 100, (20, 20, 3)) + 150 * number
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(tmp_path / "images" / name / f"{i}.png")
    return open_source(tmp_path / "images")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pretext_teacher_is_trained_once_for_each_seed(source, name):
    path = pretext_weights(name, source, seed=0, device=torch.device("cpu"))
    written = path.stat().st_mtime_ns
    assert pretext_weights(name, source, seed=0, device=torch.device("cpu")) == path
    assert path.stat().st_mtime_ns == written
    assert pretext_weights(name, source, seed=1, device=torch.device("cpu")) != path
    teacher = open_teacher(f"pretext:{name}/{path}")
    seen = teacher(Batch(torch.rand(4, 3, SIZE, SIZE)))
    assert (seen.summary is None) == (name == "gradients")
    assert seen.spatial.isfinite().all()


def test_a_classifier_without_classes_says_what_it_needs(source):
    source = open_source(source.root / "dark")
    with pytest.raises(ValueError, match="needs labels"):
        pretext_weights("classifier", source, seed=0, device=torch.device("cpu"))


def test_an_unknown_pretext_teacher_is_refused_with_the_nearest(source):
    with pytest.raises(ValueError, match="Did you mean classifier"):
        pretext_weights("clasifier", source, seed=0, device=torch.device("cpu"))
