import pytest

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
