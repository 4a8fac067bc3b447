"""Real images that need no download: those in the wheels of scikit-learn and scikit-image.

`embedded` are 1,797 scanned digits with labels, and photographs, split by photograph. `photos` are
all photographs, cut in two: training crops come from the left, held-out ones from the right, and
the class says which photograph. Crops are cut once.
"""

import io
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.files import cache_dir

VERSION = 1
"""Part of the folder's name: increase it when the images change."""
TRAIN_PHOTOS = (
    "astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "ihc", "moon", "motorcycle_left", "retina", "flower",
)  # fmt: skip
VAL_PHOTOS = ("camera", "rocket", "china", "page")
TRAIN_DIGITS = 1297
CROPS = {"train": 96, "val": 48}
"""Crops of each photograph."""
SIDE = 128
"""Side of a crop in pixels."""
LEFT, HALF_CROPS = 0.6, {"train": 64, "val": 12}
"""Share of each of the `photos` that training has, and crops of its two parts."""


def embedded_data() -> Path:
    """Return the folder with `images/{train,val}` and `digits/{train,val}`; make it if need be.

    Raises:
        ValueError: scikit-learn or scikit-image is not installed, or does not have a photograph.
    """
    return _made("embedded", _write_embedded)


def embedded_photos() -> Path:
    """Return the folder of `photos`, `{train,val}/PHOTOGRAPH`; make it if need be.

    Raises:
        ValueError: as `embedded_data`.
    """
    return _made("photos", _write_halves)


EMBEDDED = {"embedded": embedded_data, "embedded/photos": embedded_photos}
"""What `--data` calls them."""


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """Return the user's folder of some images, written whole if it is not there."""
    folder = cache_dir() / f"{name}-v{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".embedded-", dir=folder.parent))
    try:
        write(making)
        making.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _write_embedded(folder: Path) -> None:
    _write_digits(folder)
    for split, names in (("train", TRAIN_PHOTOS), ("val", VAL_PHOTOS)):
        for name in names:
            _write_crops(folder / "images" / split / f"photo_{name}", _photo(name), CROPS[split])


def _write_halves(folder: Path) -> None:
    for name in TRAIN_PHOTOS + VAL_PHOTOS:
        photo = _photo(name)
        width, height = photo.size
        middle = round(LEFT * width)
        for split, box in (("train", (0, 0, middle, height)), ("val", (middle, 0, width, height))):
            _write_crops(folder / split / name, photo.crop(box), HALF_CROPS[split])


def _write_digits(folder: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn") from error
    digits: Any = load_digits()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(digits.target))
    for rank, i in enumerate(order):
        split = "train" if rank < TRAIN_DIGITS else "val"
        image = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
        for kind, name in (
            ("digits", str(digits.target[i])),
            ("images", f"digit_{digits.target[i]}"),
        ):
            path = folder / kind / split / name / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def _write_crops(path: Path, photo: Image.Image, count: int) -> None:
    """Cut crops of a quarter to 70 % of the shorter side, drawn by the photograph's name."""
    name = path.name.removeprefix("photo_")
    draws = np.random.Generator(np.random.PCG64([len(name), *name.encode()]))
    path.mkdir(parents=True)
    for number in range(count):
        side = min(photo.size) * draws.uniform(0.25, 0.7)
        left, top = (draws.uniform(0, full - side) for full in photo.size)
        box = (left, top, left + side, top + side)
        crop = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        crop.save(path / f"{number:03d}.jpg", quality=92)


def _photo(name: str) -> Image.Image:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    try:
        import skimage
    except ImportError as error:
        raise _missing("scikit-image") from error
    folder = Path(skimage.__file__).parent / "data"
    path = next(
        (p for suffix in ("png", "jpg") if (p := folder / f"{name}.{suffix}").is_file()), None
    )
    if path is None:
        raise ValueError(
            f"scikit-image {version('scikit-image')} does not have the photograph {name!r}; "
            "install the versions in constraints.txt, or give --data."
        )
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def _missing(package: str) -> ValueError:
    return ValueError(
        f"The embedded images come with {package}, which is not installed: "
        "pip install 'backbone-zoo[train]', or give --data."
    )
