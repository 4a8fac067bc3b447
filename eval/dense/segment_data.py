"""Images with masks of class indices: the known layouts of folders, and checks of the files.

| layout | images | masks | classes |
| --- | --- | --- | --- |
| `ade20k` | `images/training` | `annotations/training` | 150; 0 is no class |
| `voc` | `JPEGImages`, by `ImageSets/Segmentation` | `SegmentationClass` | 21 |
| `cityscapes` | `leftImg8bit/train/CITY` | `gtFine/train/CITY` (ids or train ids) | 19 |
| `camvid` | `train` | `trainannot` | 11, then void |
| `folder` | `images/train` or `train/images` | `masks`, `annotations` or `labels` likewise | own |
| `tar` | `.jpg` in `train-*.tar` | `.png` of the same key | own |

Own classes are listed in a `classes.json`, in the order of the indices in the masks. A class called
void, ignore or unlabelled is not scored, and neither is the value 255 (65535 in 16 bits).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from PIL import Image

from zoo.data.crops import some_pairs
from zoo.data.images import IMAGE_SUFFIXES, EncodedImage, printable
from zoo.data.shards import entries, shards_in
from zoo.data.sources import SPLITS
from zoo.data.walk import image_files
from zoo.eval.dense.segment_classes import ADE20K_COUNT, CAMVID, CITYSCAPES, CITYSCAPES_IDS, VOC
from zoo.files import read_json

IGNORE = 255
"""The value of pixels without a class, after a mask has been read."""
NOTHING = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
MASKS = ("masks", "annotations", "labels")
LOOKED_AT = 200
"""Number of masks that are checked before any work, evenly spread over a larger set."""


class Place(NamedTuple):
    """A file, or a range of bytes inside a tar file."""

    file: Path
    offset: int = 0
    size: int = -1
    name: str = ""
    """The name of the entry in the tar file."""

    def read(self) -> bytes:
        """Return the bytes."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return printable(f"{self.file}/{self.name}" if self.name else str(self.file))


@dataclass(frozen=True)
class SegmentSet:
    """Pairs of an image and its mask, and the meaning of the values of the masks."""

    pairs: tuple[tuple[Place, Place], ...]
    classes: tuple[str, ...]
    values: Mapping[int, int]
    """Value in a mask file -> index of the class, or `IGNORE`."""
    layout: str = "folder"

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, index: int) -> str:
        """Return the name of a pair."""
        return str(self.pairs[index][0])

    def image(self, index: int) -> Image.Image:
        """Read an image as RGB; its pixels stay where they are stored, as its mask's do.

        Raises:
            UnreadableImage: it cannot be read.
        """
        place = self.pairs[index][0]
        return EncodedImage(place.read(), upright=False, name=f"The image {place}").rgb()

    def target(self, index: int) -> np.ndarray:
        """Read a mask as uint8 [H W]: indices of classes, and `IGNORE`.

        Raises:
            ValueError: it cannot be read, is a colour image, or has an unknown value.
        """
        place = self.pairs[index][1]
        raw = read_indices(place)
        found = np.unique(raw)
        unknown = [int(value) for value in found if int(value) not in self.values]
        if unknown:
            known = sorted(value for value, index in self.values.items() if index != IGNORE)
            raise ValueError(
                f"The mask {place} has the value {unknown[0]}, but there are {len(self.classes)} "
                f"classes with values {known[0]} to {known[-1]}. Correct the list of classes, or "
                f"set such pixels to {IGNORE}, which is not scored."
            )
        table = np.full(int(found[-1]) + 1, IGNORE, np.uint8)
        for value in found:
            table[value] = self.values[int(value)]
        return table[raw]


def read_indices(place: Place) -> np.ndarray:
    """Read the values of a mask [H W]: grey of 8 or 16 bits, or the indices of a palette.

    Raises:
        ValueError: the file cannot be read, or is a colour image.
    """
    image = EncodedImage(place.read(), upright=False, name=f"The mask {place}").raw()
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise ValueError(
            f"The mask {place} is a colour image (mode {image.mode}); a mask holds the index of a "
            "class in each pixel: write it in grey of 8 or 16 bits, or with a palette."
        )
    raw = np.asarray(image)
    if raw.min() < 0 or raw.max() > 65535:
        raise ValueError(f"The mask {place} holds values outside of 0..65535.")
    return raw.astype(np.uint16 if raw.dtype != np.uint8 else np.uint8)


def open_segments(
    path: Path, layout: str = "auto", unreadable: set[str] | None = None
) -> tuple[SegmentSet, SegmentSet]:
    """Open the training and the validation part of `path`, and check their files.

    Args:
        layout: One of the table above, or `auto`: the first whose folders exist.
        unreadable: Takes the names of the images that could not be checked; see `readable`.

    Raises:
        ValueError: the layout is unknown or not found, an image has no mask or a mask of another
            size, a mask has a value without a class, or the two parts have different classes.
    """
    if not path.exists():
        raise ValueError(f"There is no data at {path}; give a folder of images with masks.")
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}; there are {', '.join(LAYOUTS)}.")
    if layout == "auto":
        # with a list of classes it is the user's own data, even if the folders are like ADE20k's
        own = (path / "classes.json").is_file()
        known = {k: v for k, v in LAYOUTS.items() if not own or k in ("tar", "folder")}
    else:
        known = {layout: LAYOUTS[layout]}
    for signs, opener in known.values():
        if not any(any(path.glob(sign)) for sign in signs):
            continue
        train, val = opener(path)
        for split, part in (("train", train), ("val", val)):
            check_segments(part, f"{split} part of {path}", unreadable)
        if train.classes != val.classes:
            raise ValueError(
                f"The parts of {path} do not have the same classes: train has "
                f"{len(train.classes)} ({', '.join(train.classes[:5])}, ...) and val "
                f"{len(val.classes)} ({', '.join(val.classes[:5])}, ...)."
            )
        return train, val
    looked = ", ".join(f"{name}: {' or '.join(signs)}" for name, (signs, _) in known.items())
    raise ValueError(f"{path} holds no images with masks in a known layout ({looked}).")


def check_segments(part: SegmentSet, what: str, unreadable: set[str] | None = None) -> None:
    """Check a set before any work; of a large one, only `LOOKED_AT` masks.

    A pair of which the image or the mask cannot be read is left out.

    Raises:
        ValueError: it is empty, nothing in it can be read, a mask does not fit its image or has
            unknown values, or no pixel is scored.
    """
    if not len(part):
        raise ValueError(f"The {what} is empty: no image has a mask.")
    scored = False
    for index, mask, size in some_pairs(part, LOOKED_AT, unreadable):
        if mask.shape[::-1] != size:
            raise ValueError(
                f"The image {part.key(index)} has {size[0]}x{size[1]} pixels and its mask "
                f"{mask.shape[1]}x{mask.shape[0]}; they must have the same size."
            )
        scored |= bool((mask != IGNORE).any())
    if not scored:
        raise ValueError(f"No mask of the {what} has a pixel of a class that is scored.")


def own_classes(folder: Path) -> tuple[tuple[str, ...], dict[int, int]]:
    """Read `classes.json`: return the names that are scored, and the meaning of each value.

    Raises:
        ValueError: it is missing, is not a list of names, or leaves no class to score.
    """
    file = folder / "classes.json"
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: write a list of the classes' names, in the order of their indices."
        )
    names = read_json(file, list[str])
    scored = [name for name in names if name.lower() not in NOTHING]
    if not scored or len(set(scored)) != len(scored) or len(scored) > IGNORE:
        raise ValueError(
            f"{file} names {len(scored)} classes, {len(set(scored))} of them different; there must "
            f"be 1 to {IGNORE} different ones."
        )
    values = {value: scored.index(n) for value, n in enumerate(names) if n in scored}
    return tuple(scored), _with_nothing(values, len(names))


def _with_nothing(values: dict[int, int], count: int) -> dict[int, int]:
    nothing = dict.fromkeys((*range(count), IGNORE, 65535), IGNORE)
    return nothing | values


def _stems(folder: Path, *, again: bool = False) -> dict[str, Path]:
    """Return the images below a folder by their paths in it, without the endings."""
    names = image_files(folder, again=again) if folder.is_dir() else []
    return {str(PurePath(name).with_suffix("")): folder / name for name in names}


def _paired(
    images: Sequence[Path], masks: Mapping[str, Path], stems: Sequence[str], where: Path
) -> tuple[tuple[Place, Place], ...]:
    """Pair images with masks by name; refuse images without a mask."""
    lost = [str(image) for image, stem in zip(images, stems, strict=True) if stem not in masks]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(images)} images have no mask in {where}, {lost[0]} first; a mask "
            "has its image's name."
        )
    return tuple((Place(i), Place(masks[s])) for i, s in zip(images, stems, strict=True))


def _by_folder(images: Path, masks: Path) -> tuple[tuple[Place, Place], ...]:
    found = _stems(images)
    return _paired([*found.values()], _stems(masks, again=True), [*found], masks)


def _ade20k(path: Path) -> tuple[SegmentSet, SegmentSet]:
    values = _with_nothing({i + 1: i for i in range(ADE20K_COUNT)}, 1)
    names = tuple(f"class {i + 1}" for i in range(ADE20K_COUNT))
    table = path / "objectInfo150.txt"
    if table.is_file():  # Idx, Ratio, Train, Val, Stuff, Name with its synonyms
        rows = [
            row.split("\t")
            for row in table.read_text("utf-8", "replace").splitlines()
            if row[:1].isdigit()
        ]
        if len(rows) != ADE20K_COUNT:
            raise ValueError(f"{table} names {len(rows)} classes, and ADE20k has {ADE20K_COUNT}.")
        names = tuple(row[-1].partition(",")[0].strip() for row in rows)
        # a name that occurs twice gets its number
        names = tuple(n if names.count(n) == 1 else f"{n} {i + 1}" for i, n in enumerate(names))
    parts = []
    for split in ("training", "validation"):
        pairs = _by_folder(path / "images" / split, path / "annotations" / split)
        parts.append(SegmentSet(pairs, names, values, "ade20k"))
    return parts[0], parts[1]


def _voc(path: Path) -> tuple[SegmentSet, SegmentSet]:
    values = _with_nothing({i: i for i in range(len(VOC))}, 0)
    parts = []
    for split in ("train", "val"):
        file = path / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not file.is_file():
            raise ValueError(f"{file} is missing: VOC lists its {split} images there.")
        stems = file.read_text("utf-8", "replace").split()
        images = [path / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        lost = [str(image) for image in images if not image.is_file()]
        if lost:
            raise ValueError(
                f"{len(lost)} of {len(images)} images of {file} are missing: {lost[0]}."
            )
        masks = {p.stem: p for p in (path / "SegmentationClass").glob("*.png")}
        parts.append(
            SegmentSet(
                _paired(images, masks, stems, path / "SegmentationClass"), VOC, values, "voc"
            )
        )
    return parts[0], parts[1]


def _cityscapes(path: Path) -> tuple[SegmentSet, SegmentSet]:
    parts = []
    ready = bool(list(path.glob("gtFine/*/*/*_labelTrainIds.png")))
    ending = "_gtFine_labelTrainIds" if ready else "_gtFine_labelIds"
    raw = {i: i for i in range(len(CITYSCAPES))} if ready else CITYSCAPES_IDS
    for split in ("train", "val"):
        images = [*_stems(path / "leftImg8bit" / split).values()]
        folder = path / "gtFine" / split
        masks = {p.stem: p for p in folder.glob(f"*/*{ending}.png")}
        stems = [p.stem.removesuffix("_leftImg8bit") + ending for p in images]
        pairs = _paired(images, masks, stems, folder)
        parts.append(SegmentSet(pairs, CITYSCAPES, _with_nothing(dict(raw), 34), "cityscapes"))
    return parts[0], parts[1]


def _camvid(path: Path) -> tuple[SegmentSet, SegmentSet]:
    values = _with_nothing({i: i for i in range(len(CAMVID))}, len(CAMVID) + 1)
    held_out = "val" if (path / "valannot").is_dir() else "test"
    parts = [
        SegmentSet(_by_folder(path / s, path / f"{s}annot"), CAMVID, values, "camvid")
        for s in ("train", held_out)
    ]
    return parts[0], parts[1]


def _folder(path: Path) -> tuple[SegmentSet, SegmentSet]:
    parts = []
    for names in SPLITS.values():
        found = [
            (images, masks, own)
            for split in names
            for kind in MASKS
            for images, masks, own in (
                (path / "images" / split, path / kind / split, path / kind / split),
                (path / split / "images", path / split / kind, path / split),
            )
            if images.is_dir() and masks.is_dir()
        ]
        if not found:
            raise ValueError(
                f"{path} has no images and masks for {names[0]}: images/{names[0]} beside "
                f"masks/{names[0]}, or {names[0]}/images beside {names[0]}/masks."
            )
        images, masks, own = found[0]
        listed = own if (own / "classes.json").is_file() else path
        parts.append(SegmentSet(_by_folder(images, masks), *own_classes(listed)))
    return parts[0], parts[1]


def _tar(path: Path) -> tuple[SegmentSet, SegmentSet]:
    classes, values = own_classes(path)
    parts = []
    for names in SPLITS.values():
        shards = shards_in(path, names)
        if not shards:
            raise ValueError(f"{path} has no shards for {names[0]}: {names[0]}-000.tar, ...")
        pairs = tuple(pair for shard in shards for pair in _index(shard))
        parts.append(SegmentSet(pairs, classes, values, "tar"))
    return parts[0], parts[1]


def _index(shard: Path) -> list[tuple[Place, Place]]:
    """Pair the images and masks of a shard by their keys, in the order of the images."""
    images: dict[str, Place] = {}
    masks: dict[str, Place] = {}
    for entry in entries(shard):
        kind = images if entry.extension in ("jpg", "jpeg", "webp") else masks
        if f".{entry.extension}" in IMAGE_SUFFIXES:
            kind[entry.key] = Place(shard, entry.offset, entry.size, entry.name)
    lost = [str(place) for key, place in images.items() if key not in masks]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(images)} images in {shard} have no mask (a .png of the same "
            f"key), {lost[0]} first."
        )
    return [(place, masks[key]) for key, place in images.items()]


LAYOUTS = {
    "ade20k": (("annotations/training",), _ade20k),
    "voc": (("SegmentationClass",), _voc),
    "cityscapes": (("gtFine",), _cityscapes),
    "camvid": (("trainannot",), _camvid),
    "tar": (("*.tar",), _tar),
    "folder": (("images", "*/images"), _folder),
}
"""Layout -> the paths by which it is recognised, and the function that opens it."""
