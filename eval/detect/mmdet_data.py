"""A folder of COCO's layout, as mmdet's data sets want to be told of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Split:
    """One half of a folder: its annotations, its images, and what they say."""

    annotations: Path
    images: Path
    classes: tuple[str, ...]
    """Names in the order of the file; category ids may have gaps."""
    has_masks: bool
    num_images: int


def read_split(folder: Path, split: str) -> Split:
    """Find and check `annotations/instances_SPLIT*.json` and the images of `SPLIT*/`.

    Raises:
        ValueError: a file or a folder is missing or there are several, the file is no COCO file,
            has no categories, two of one name, no annotations, or names images that are not there.
    """
    annotations = _only(folder, f"annotations/instances_{split}*.json")
    year = annotations.stem.removeprefix("instances_")
    images = folder / year
    if not images.is_dir():
        raise ValueError(f"{annotations} is there, but the folder of its images is not: {images}.")
    content = _read(annotations)
    names = tuple(category["name"] for category in content["categories"])
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{annotations} has {len(names)} categories with {len(set(names))} names.")
    if not content["annotations"]:
        raise ValueError(f"{annotations} has no annotations, so there is nothing to detect.")
    here = {path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()}
    missing = [image["file_name"] for image in content["images"] if image["file_name"] not in here]
    if missing:
        raise ValueError(
            f"{annotations} names {len(missing)} images that {images} does not have, "
            f"{missing[0]!r} first. Add them, or take them out of the file."
        )
    masked = all(note.get("segmentation") for note in content["annotations"])
    return Split(
        annotations=annotations,
        images=images,
        classes=names,
        has_masks=masked,
        num_images=len(content["images"]),
    )


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"One file {pattern} is wanted in {folder}; there is {names}.")
    return found[0]


def _read(annotations: Path) -> dict[str, Any]:
    try:
        content = json.loads(annotations.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{annotations} is no JSON file: {error}.") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(k), list) for k in keys):
        raise ValueError(f"{annotations} is no COCO file: it wants lists {', '.join(keys)}.")
    return content
