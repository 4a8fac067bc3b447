"""Real images that need no download: those in the wheels of scikit-learn and scikit-image.

1,797 scanned digits with labels, and photographs. The photographs are split by photograph, and
each is cut into crops once, so that digits and photographs have about the same weight.
"""

import io
import shutil
import tempfile
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


def embedded_data() -> Path:
    """Return the folder with `images/{train,val}` and `digits/{train,val}`; make it if need be.

    Raises:
        ValueError: scikit-learn or scikit-image is not installed, or does not have a photograph.
    """
    folder = cache_dir() / f"embedded-v{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=".embedded-", dir=folder.parent))
    try:
        _write_digits(making)
        _write_photos(making, "train", TRAIN_PHOTOS)
        _write_photos(making, "val", VAL_PHOTOS)
        making.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


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


def _write_photos(folder: Path, split: str, names: tuple[str, ...]) -> None:
    for name in names:
        photo = _photo(name)
        draws = np.random.Generator(np.random.PCG64([len(name), *name.encode()]))
        path = folder / "images" / split / f"photo_{name}"
        path.mkdir(parents=True)
        for number in range(CROPS[split]):
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
