"""A COCO folder of known content, for mmdet."""

import json

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30)}


@pytest.fixture(scope="session")
def toy_coco(tmp_path_factory):
    """Four images a split, each with one rectangle, red or green; category ids have a gap."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    categories = [dict(id=3, name="red"), dict(id=7, name="green")]
    for split in ("train", "val"):
        (root / split).mkdir()
        images, notes = [], []
        for i in range(4):
            kind, (x, y, w, h) = categories[i % 2], (8 + 4 * i, 10, 24, 20)
            pixels = np.full((64, 64, 3), 40, np.uint8)
            pixels[y : y + h, x : x + w] = COLOURS[kind["name"]]
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            images.append(dict(id=i + 1, file_name=f"{i}.png", height=64, width=64))
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            notes.append(
                dict(
                    id=i + 1, image_id=i + 1, category_id=kind["id"], bbox=[x, y, w, h],
                    area=w * h, iscrowd=0, segmentation=[corners],
                )
            )  # fmt: skip
        content = dict(images=images, annotations=notes, categories=categories)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
