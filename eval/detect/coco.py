"""Find, read and check folders of images with COCO annotations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.data.images import printable, stored_size
from zoo.data.unreadable import Lost, readable, try_read
from zoo.eval.detect.masks import is_coordinate, problem_of
from zoo.files import ANNOTATION_BYTES, read_json

LAYOUTS = (
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}2017.json", "images/{split}2017"),
    ("{split}/_annotations.coco.json", "{split}"),
    ("annotations/{split}.json", "{split}"),
    ("{split}.json", "{split}"),
)
"""(annotations, images) in the folder; the first pair that exists is used."""
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
LISTED = 3
"""Number of examples in a message."""


@dataclass(frozen=True)
class CocoImage:
    """One image: its id in the annotations, its file and its size in pixels."""

    id: int
    path: Path
    rows: int
    cols: int


@dataclass(frozen=True)
class CocoSplit:
    """Checked annotations; a label is an index into `classes`."""

    file: Path
    folder: Path
    """The folder of the images."""
    images: tuple[CocoImage, ...]
    classes: tuple[str, ...]
    """In the order of the file, as mmdet has them."""
    category_ids: tuple[int, ...]
    """The ids of `classes` in the file; they may have gaps, labels do not."""
    annotations: Mapping[int, Sequence[Mapping[str, Any]]]
    """The annotations by image id; an empty list for images without objects."""
    class_agnostic: bool = False
    """Treat all classes as one, in training and in the metric."""
    unreadable: tuple[str, ...] = ()
    """Images of the file that are none, by their headers: they are not among `images`."""

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """Return the name of an image."""
        return printable(str(self.images[index].path))

    def objects(self, image: CocoImage) -> list[Mapping[str, Any]]:
        """Return the annotations for training: without crowds and boxes of no area."""
        return [
            a
            for a in self.annotations[image.id]
            if not a.get("iscrowd") and a["bbox"][2] > 0 and a["bbox"][3] > 0
        ]

    def label(self, annotation: Mapping[str, Any]) -> int:
        """Return the label of an annotation; always 0 if the split is class-agnostic."""
        return 0 if self.class_agnostic else self.category_ids.index(annotation["category_id"])

    def require_objects(self) -> None:
        """Raise a ValueError if the split has no object."""
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
                f"{_listed(without)}); add segmentations, or choose a detector of boxes only."
            )

    def with_classes(self, classes: Sequence[str]) -> "CocoSplit":
        """Return the split with its classes in a detector's order; the file's ids stay.

        Raises:
            ValueError: the two have different names.
        """
        if self.class_agnostic:
            return self
        if set(classes) != set(self.classes):
            ours, theirs = set(self.classes) - set(classes), set(classes) - set(self.classes)
            differing = [f"only there: {_listed(sorted(ours))}"] if ours else []
            differing += [f"not there: {_listed(sorted(theirs))}"] if theirs else []
            raise ValueError(
                f"The classes of {self.file} are not the detector's ({'; '.join(differing)}). Give "
                "annotations with the same names, or compare boxes only, class-agnostic."
            )
        ids = dict(zip(self.classes, self.category_ids, strict=True))
        return replace(self, classes=tuple(classes), category_ids=tuple(ids[c] for c in classes))

    def first(self, count: int) -> "CocoSplit":
        """Return the split with its first `count` images only."""
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
        class_agnostic: Treat all classes as one.

    Raises:
        ValueError: there is no such split, or as `read_coco`.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give one with COCO annotations.")
    for name in SPLITS[split]:
        for annotations, images in LAYOUTS:
            file, place = folder / annotations.format(split=name), images.format(split=name)
            if file.is_file() and (folder / place).is_dir():
                return read_coco(file, folder / place, class_agnostic=class_agnostic)
    shown = "; ".join(f"{a} with {i}/" for a, i in LAYOUTS[::2]).format(split=split)
    raise ValueError(f"{folder} has no COCO split {split!r}; known layouts are {shown}.")


def read_coco(file: Path, images: Path, *, class_agnostic: bool = False) -> CocoSplit:
    """Read a file of COCO annotations and check it against the folder of its images.

    Raises:
        ValueError: it is not a COCO file, ids are duplicate or unknown, a box or a mask is
            malformed, or images are missing or of another size, or all unreadable.
    """
    content = _read(file)
    categories = content["categories"]
    ids, names = _ids(categories, file, "category"), [c.get("name") for c in categories]
    strange = [name for name in names if not isinstance(name, str | int)]
    double = strange or [name for name, count in Counter(names).items() if count > 1]
    if double or not names:
        raise ValueError(f"{file}: classes need different names; see {_listed(double or names)}")
    known = set(_ids(content["images"], file, "image"))
    _ids(content["annotations"], file, "annotation")
    unreadable: set[str] = set()
    found = _images(content["images"], file, images, unreadable)
    sizes = {image.id: (image.rows, image.cols) for image in found}
    by_image: dict[int, list[Mapping[str, Any]]] = {i: [] for i in sizes}
    wrong = []
    for annotation in content["annotations"]:
        number = annotation.get("image_id")
        if isinstance(number, int) and number in known - sizes.keys():
            continue  # of an image that cannot be read
        problem = _problem_of(annotation, sizes, set(ids))
        if problem:
            wrong.append(f"annotation {annotation['id']}: {problem}")
        else:
            by_image[annotation["image_id"]].append(annotation)
    if wrong:
        raise ValueError(
            f"{file} has {len(wrong)} bad annotations. {wrong[0]}. Correct or remove them."
        )
    return CocoSplit(
        file,
        images,
        tuple(found),
        ("object",) if class_agnostic else tuple(map(str, names)),
        (min(ids),) if class_agnostic else tuple(ids),
        by_image,
        class_agnostic,
        tuple(sorted(unreadable)),
    )


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file, most=ANNOTATION_BYTES)
    parts = ("images", "annotations", "categories")
    if not all(
        isinstance(content.get(part), list) and all(isinstance(x, dict) for x in content[part])
        for part in parts
    ):
        raise ValueError(f"{file} is not a COCO file: it needs the lists {', '.join(parts)}.")
    if not content["images"]:
        raise ValueError(f"{file} lists no image.")
    return content


def _ids(entries: Sequence[Mapping[str, Any]], file: Path, what: str) -> list[int]:
    ids = [entry.get("id") for entry in entries]
    if not all(isinstance(i, int) and abs(i) < 2**63 for i in ids):
        raise ValueError(
            f"{file}: the {what} ids must be whole numbers of 64 bits, and each must have one."
        )
    double = [i for i, count in Counter(ids).items() if count > 1]
    if double:
        raise ValueError(f"{file}: {what} ids occur twice: {_listed(double)}.")
    return [int(i) for i in ids if i is not None]


@dataclass(frozen=True)
class _Headers:
    """The sizes in the images' headers: annotations ignore the EXIF orientation."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return printable(str(self.paths[index]))

    def read(self, index: int) -> tuple[int, int, int] | Lost:
        """Return the index with width and height as stored."""
        return try_read(self, index, lambda i: (i, *stored_size(self.paths[i])))


def _images(
    entries: Sequence[Mapping[str, Any]], file: Path, folder: Path, unreadable: set[str]
) -> list[CocoImage]:
    """Find the images and read the sizes in their headers; leave out those that are unreadable."""
    nameless = [e["id"] for e in entries if not isinstance(e.get("file_name"), str)]
    if nameless:
        raise ValueError(f"{file}: images without a file_name: {_listed(nameless)}.")
    paths = [folder / entry["file_name"] for entry in entries]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} images of {file} are missing in {folder}: "
            f"{_listed(missing)}. Add them, or remove them from the file."
        )
    headers, found, wrong = _Headers(paths), [], []
    with ThreadPoolExecutor(8) as pool:
        for index, cols, rows in readable(pool.map(headers.read, range(len(paths))), unreadable):
            entry, path = entries[index], paths[index]
            stated = (entry.get("height", rows), entry.get("width", cols))
            if stated != (rows, cols):
                wrong.append(f"{path.name} has {rows}x{cols} pixels, not {stated[0]}x{stated[1]}")
            found.append(CocoImage(entry["id"], path, rows, cols))
    if wrong:
        raise ValueError(f"{len(wrong)} images do not fit {file}: {_listed(wrong)}.")
    return found


def _problem_of(
    annotation: Mapping[str, Any], sizes: Mapping[int, tuple[int, int]], categories: set[int]
) -> str | None:
    for what, known in (("image", sizes), ("category", categories)):
        number = annotation.get(f"{what}_id")
        if not isinstance(number, int) or number not in known:
            return f"{what} {number} is not in the file"
    box = annotation.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4:
        return "bbox is not x, y, width, height"
    if not all(map(is_coordinate, box)) or min(box[2:]) < 0:
        return f"bbox {str(box)[:99]} is not a box"
    rows, cols = sizes[annotation["image_id"]]
    if box[0] >= cols or box[1] >= rows or box[0] + box[2] < 0 or box[1] + box[3] < 0:
        return f"bbox {box} lies outside the image of {cols} x {rows}"
    if _has_mask(annotation):
        return problem_of(annotation["segmentation"], rows, cols)
    return None
