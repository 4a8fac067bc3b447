"""Synthetic images with COCO annotations, for tests and trials without data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from zoo.eval.detect.masks import encode

CLASSES = ("disc", "square", "triangle")
CATEGORY_IDS = (3, 7, 8)
"""Ids with gaps, as in COCO's own files."""
COLOURS = ((230, 60, 50), (60, 170, 80), (70, 90, 220))


def write_shapes(
    folder: Path, *, train: int = 16, val: int = 8, side: int = 96, seed: int = 0
) -> None:
    """Write a COCO folder of coloured shapes on noise, which follows from the seed.

    Masks of squares and triangles are polygons, those of discs run lengths. The last image of each
    part has no object, and one object of the first image is a crowd.

    Args:
        train: Images of the training part.
        val: Images of the validation part.
        side: Height of the images in pixels, and the largest width.
    """
    for part, count in (("train", train), ("val", val)):
        draws = np.random.default_rng((seed, part == "val"))
        (folder / part).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(1, count + 1):
            rows, cols = side, side - 8 * int(draws.integers(0, 4))
            name = f"{part}_{i:04d}.png"
            image, objects = _image(
                draws, rows, cols, 0 if i == count else int(draws.integers(1, 4))
            )
            image.save(folder / part / name)
            images.append(dict(id=10 * i, file_name=name, width=cols, height=rows))
            for entry in objects:
                at = dict(id=len(annotations) + 1, image_id=10 * i)
                annotations.append(at | entry | dict(iscrowd=int(not annotations)))
        categories = [dict(id=i, name=name) for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def _image(
    draws: np.random.Generator, rows: int, cols: int, count: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    noise = draws.integers(90, 150, (rows, cols, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    pen, objects = ImageDraw.Draw(image), []
    for _ in range(count):
        label = int(draws.integers(len(CLASSES)))
        side = int(draws.integers(rows // 5, rows // 2))
        left, top = (int(draws.integers(0, limit - side)) for limit in (cols, rows))
        right, bottom = left + side, top + side
        box = dict(bbox=[left, top, side + 1, side + 1], category_id=CATEGORY_IDS[label])
        if CLASSES[label] == "disc":
            alone = Image.new("1", (cols, rows))
            ImageDraw.Draw(alone).ellipse((left, top, right, bottom), fill=1)
            pen.ellipse((left, top, right, bottom), fill=COLOURS[label])
            mask = np.asarray(alone)
            about = dict(segmentation=encode(mask[None])[0], area=int(mask.sum()))
        else:
            points = [(left, top), (right + 1, top), (right + 1, bottom + 1), (left, bottom + 1)]
            if CLASSES[label] == "triangle":
                points = [((left + right) // 2, top), (right + 1, bottom + 1), (left, bottom + 1)]
            pen.polygon([(min(x, right), min(y, bottom)) for x, y in points], fill=COLOURS[label])
            flat = [float(v) for point in points for v in point]
            area = (side + 1) ** 2 / (2 if CLASSES[label] == "triangle" else 1)
            about = dict(segmentation=[flat], area=area)
        objects.append(box | about)
    return image, objects
