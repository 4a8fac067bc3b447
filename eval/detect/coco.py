"""Folders of images with COCO annotations: found, read, and checked before any work."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image

from zoo.eval.detect.masks import problem_of

LAYOUTS = (
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}2017.json", "images/{split}2017"),
    ("{split}/_annotations.coco.json", "{split}"),
    ("annotations/{split}.json", "{split}"),
    ("{split}.json", "{split}"),
)
"""(annotations, images) below the folder; the first pair that is there counts."""
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
LISTED = 3
"""Examples in a message."""


@dataclass(frozen=True)
class CocoImage:
    """One image: its id in the file, where it lies, and its size."""

    id: int
    path: Path
    rows: int
    cols: int


@dataclass(frozen=True)
class CocoSplit:
    """Annotations that have been checked; a label is a class's place in `classes`."""

    file: Path
    folder: Path
    """Where the images lie."""
    images: tuple[CocoImage, ...]
    classes: tuple[str, ...]
    """In the order of the file, which is mmdet's too."""
    category_ids: tuple[int, ...]
    """The file's ids of `classes`; they may have gaps, labels have none."""
    annotations: Mapping[int, Sequence[Mapping[str, Any]]]
    """By image id; images without objects have an empty list."""
    class_agnostic: bool = False
    """All classes count as one, in training and in the metric."""

    def __len__(self) -> int:
        return len(self.images)

    def objects(self, image: CocoImage) -> list[Mapping[str, Any]]:
        """Return the annotations to learn from: no crowds, no boxes without area."""
        return [
            a for a in self.annotations[image.id]
            if not a.get("iscrowd") and a["bbox"][2] > 0 and a["bbox"][3] > 0
        ]  # fmt: skip

    def label(self, annotation: Mapping[str, Any]) -> int:
        """Return the label of an annotation: 0 for all of them if the split is class-agnostic."""
        return 0 if self.class_agnostic else self.category_ids.index(annotation["category_id"])

    def require_objects(self) -> None:
        """Raise a ValueError if there is nothing to learn or to find."""
        if not any(self.objects(image) for image in self.images):
            raise ValueError(
                f"{self.file} has no object in its {len(self)} images (crowds and empty boxes do "
                "not count); give annotations with boxes."
            )

    def require_masks(self) -> None:
        """Raise a ValueError if an object has no mask."""
        without = [a["id"] for i in self.images for a in self.objects(i) if not _has_mask(a)]
        if without:
            raise ValueError(
                f"{len(without)} objects of {self.file} have no mask (annotation "
                f"{_listed(without)}); add segmentations, or choose a detector of boxes alone."
            )

    def with_classes(self, classes: Sequence[str]) -> "CocoSplit":
        """Order the classes as a detector has them; ids stay as this file has them.

        Raises:
            ValueError: the names are not the same.
        """
        if self.class_agnostic:
            return self
        if set(classes) != set(self.classes):
            ours, theirs = set(self.classes) - set(classes), set(classes) - set(self.classes)
            stated = [f"only there: {_listed(sorted(ours))}"] if ours else []
            stated += [f"not there: {_listed(sorted(theirs))}"] if theirs else []
            raise ValueError(
                f"The classes of {self.file} are not the detector's ({'; '.join(stated)}). Give "
                "annotations with the same names, or compare boxes alone, class-agnostic."
            )
        ids = dict(zip(self.classes, self.category_ids, strict=True))
        return replace(self, classes=tuple(classes), category_ids=tuple(ids[c] for c in classes))

    def first(self, count: int) -> "CocoSplit":
        """Return a part: the first `count` images."""
        return replace(self, images=self.images[:count])


def _has_mask(annotation: Mapping[str, Any]) -> bool:
    return bool(annotation.get("segmentation"))


def _listed(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:LISTED])
    return shown + (f" and {len(items) - LISTED} more" if len(items) > LISTED else "")


def open_coco(folder: Path, split: str, *, class_agnostic: bool = False) -> CocoSplit:
    """Find and read one split of a folder, in any of `LAYOUTS`.

    Args:
        split: `train` or `val`; the latter may also be called valid, validation or test.

    Raises:
        ValueError: there is none, or its file or an image is not as it should be.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give one with COCO annotations.")
    for name in SPLITS[split]:
        for annotations, images in LAYOUTS:
            file, place = folder / annotations.format(split=name), images.format(split=name)
            if file.is_file() and (folder / place).is_dir():
                return read_coco(file, folder / place, class_agnostic=class_agnostic)
    shown = "; ".join(f"{a} with {i}/" for a, i in LAYOUTS[::2]).format(split=split)
    raise ValueError(f"{folder} has no COCO split {split!r}; laid out like {shown}.")


def read_coco(file: Path, images: Path, *, class_agnostic: bool = False) -> CocoSplit:
    """Read a file of COCO annotations and check it against the folder of its images.

    Raises:
        ValueError: the file is no COCO file, ids are double or point nowhere, a box or a mask
            is malformed, images are missing, unreadable or of another size.
    """
    content = _read(file)
    categories = content["categories"]
    ids, names = _ids(categories, file, "category"), [c.get("name") for c in categories]
    double = [name for name, count in Counter(names).items() if count > 1]
    if double or not names or None in names:
        raise ValueError(f"{file}: classes need names of their own; see {_listed(double or names)}")
    known = set(_ids(content["images"], file, "image"))
    _ids(content["annotations"], file, "annotation")
    found = _images(content["images"], file, images)
    sizes = {image.id: (image.rows, image.cols) for image in found}
    by_image: dict[int, list[Mapping[str, Any]]] = {i: [] for i in known}
    wrong = []
    for annotation in content["annotations"]:
        problem = _problem_of(annotation, sizes, set(ids))
        if problem:
            wrong.append(f"annotation {annotation['id']}: {problem}")
        else:
            by_image[annotation["image_id"]].append(annotation)
    if wrong:
        raise ValueError(f"{file} has {len(wrong)} bad annotations. {wrong[0]}. Mend or drop them.")
    return CocoSplit(
        file,
        images,
        tuple(found),
        ("object",) if class_agnostic else tuple(map(str, names)),
        (min(ids),) if class_agnostic else tuple(ids),
        by_image,
        class_agnostic,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON file: {error}.") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) and all(isinstance(x, dict) for x in content[part])
        for part in parts
    ):
        raise ValueError(f"{file} is no COCO file: it needs lists {', '.join(parts)}.")
    if not content["images"]:
        raise ValueError(f"{file} lists no image.")
    return content


def _ids(entries: Sequence[Mapping[str, Any]], file: Path, what: str) -> list[int]:
    ids = [entry.get("id") for entry in entries]
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{file}: the {what} ids must be whole numbers, and each must have one.")
    double = [i for i, count in Counter(ids).items() if count > 1]
    if double:
        raise ValueError(f"{file}: {what} ids stand there twice: {_listed(double)}.")
    return [int(i) for i in ids if i is not None]


def _images(entries: Sequence[Mapping[str, Any]], file: Path, folder: Path) -> list[CocoImage]:
    """Find the images and read the sizes in their headers."""
    nameless = [e["id"] for e in entries if not isinstance(e.get("file_name"), str)]
    if nameless:
        raise ValueError(f"{file}: images without a file_name: {_listed(nameless)}.")
    paths = [folder / entry["file_name"] for entry in entries]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} images of {file} are missing in {folder}: "
            f"{_listed(missing)}. Bring them back, or take them out of the file."
        )
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_size, paths))
    wrong = []
    for entry, path, size in zip(entries, paths, sizes, strict=True):
        stated = (entry.get("height", size and size[0]), entry.get("width", size and size[1]))
        if size is None:
            wrong.append(f"{path.name} is no image that can be read")
        elif stated != size:
            wrong.append(
                f"{path.name} has {size[0]}x{size[1]} pixels, {stated[0]}x{stated[1]} there"
            )
    if wrong:
        raise ValueError(f"{len(wrong)} images do not fit {file}: {_listed(wrong)}.")
    return [
        CocoImage(entry["id"], path, *size)
        for entry, path, size in zip(entries, paths, sizes, strict=True)
        if size
    ]


def _size(path: Path) -> tuple[int, int] | None:
    """Rows and columns as stored: annotations do not know of the camera's orientation."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError:
        return None


def _problem_of(
    annotation: Mapping[str, Any], sizes: Mapping[int, tuple[int, int]], categories: set[int]
) -> str | None:
    if annotation.get("image_id") not in sizes:
        return f"image {annotation.get('image_id')} is not in the file"
    if annotation.get("category_id") not in categories:
        return f"category {annotation.get('category_id')} is not in the file"
    box = annotation.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4:
        return "bbox is not x, y, width, height"
    if not all(isinstance(x, Real) and math.isfinite(x) for x in box) or min(box[2:]) < 0:
        return f"bbox {box} is no box"
    rows, cols = sizes[annotation["image_id"]]
    if box[0] >= cols or box[1] >= rows or box[0] + box[2] < 0 or box[1] + box[3] < 0:
        return f"bbox {box} lies outside the image of {cols} x {rows}"
    if _has_mask(annotation):
        return problem_of(annotation["segmentation"], rows, cols)
    return None
