import numpy as np
import pytest
from PIL import Image

from zoo.data import embedded
from zoo.data.embedded import TRAIN_DIGITS, TRAIN_PHOTOS, VAL_PHOTOS, embedded_data
from zoo.data.sources import open_splits

pytest.importorskip("sklearn", reason="scikit-learn ships the digits; it is an extra")
pytest.importorskip("skimage", reason="scikit-image ships the photographs; it is an extra")


@pytest.mark.slow
def test_the_embedded_images_are_all_there_and_split_by_photograph(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    folder = embedded_data()
    assert embedded_data() == folder
    train, val = open_splits(folder / "digits", 0.1)
    assert (len(train), len(val)) == (TRAIN_DIGITS, 1797 - TRAIN_DIGITS)
    assert list(train.classes) == list(val.classes) == [str(i) for i in range(10)]
    train, val = open_splits(folder / "images", 0.1)
    photos = [{c for c in s.classes if c.startswith("photo_")} for s in (train, val)]
    assert len(photos[0]) == len(TRAIN_PHOTOS) and len(photos[1]) == len(VAL_PHOTOS)
    assert not photos[0] & photos[1]
    assert not list(tmp_path.glob(".embedded-*"))


def test_the_photos_are_cut_in_two_and_no_held_out_crop_shows_what_training_saw(
    tmp_path, monkeypatch
):
    """Of photographs that are black on the left and white on the right."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "HALF_CROPS", {"train": 3, "val": 2})
    pixels = np.zeros((100, 150, 3), np.uint8)
    pixels[:, round(embedded.LEFT * 150) :] = 255
    monkeypatch.setattr(embedded, "_photo", lambda name: Image.fromarray(pixels))
    parts = open_splits(embedded.embedded_photos(), 0.1)
    for source, colour, each in zip(parts, (0, 255), (3, 2), strict=True):
        assert list(source.classes) == sorted(TRAIN_PHOTOS + VAL_PHOTOS)
        assert len(source) == each * len(source.classes)
        first = Image.open(source.root / source.files[0])
        assert np.asarray(first).shape == (128, 128, 3) and (np.asarray(first) == colour).all()
