"""Results of mmdet and mmseg, for a report beside our own."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from zoo.files import parse_json

STAMP = re.compile(r"\d{8}_\d{6}|vis_data")
"""Folders that mmengine makes for each start of a run."""
SIZES = {"": "AP", "50": "AP50", "75": "AP75", "s": "AP_small", "m": "AP_medium", "l": "AP_large"}
BOXES = {f"coco/bbox_mAP{f'_{k}' if k else ''}": f"detect/box/{v}" for k, v in SIZES.items()}
MASKS = {f"coco/segm_mAP{f'_{k}' if k else ''}": f"detect/mask/{v}" for k, v in SIZES.items()}
SHARES = BOXES | MASKS
"""mmdet's names -> ours, of numbers that are shares of 1 there."""
PERCENTS = {"mIoU": "segment/miou", "mAcc": "segment/mean_accuracy", "aAcc": "segment/accuracy"}
"""mmseg's names -> ours; both in per cent."""


class Added(NamedTuple):
    """The numbers of a foreign result."""

    model: str
    data: str
    values: dict[str, float]
    source: str


def read_added(word: str) -> Added:
    """Read `DATA:FILE`: what mmdet or mmseg wrote of an evaluation (a .json beside its logs).

    The model is called as the run's folder. Of several lines (`scalars.json`) the last counts that
    has such numbers.

    Raises:
        ValueError: there is no such file, or it holds no number that is known.
    """
    data, colon, place = word.partition(":")
    path = Path(place)
    if not colon or not data:
        raise ValueError(f"--add {word}: name the data set and the file, as in coco:results.json.")
    if not path.is_file():
        raise ValueError(f"--add {word}: there is no file {path}.")
    values = known_numbers(_last(path))
    if not values:
        raise ValueError(
            f"{path} holds no number of mmdet or mmseg (coco/bbox_mAP, mIoU, ...): give the .json "
            "that its test wrote."
        )
    folders = [folder.name for folder in path.resolve().parents if not STAMP.fullmatch(folder.name)]
    return Added(folders[0] or path.stem, data, values, str(path))


def known_numbers(content: dict[str, Any]) -> dict[str, float]:
    """Return the numbers that have a name of ours, in per cent."""
    found = {}
    for name, value in content.items():
        if isinstance(value, int | float) and value >= 0:  # -1 is COCO's "no such object"
            if name in SHARES:
                found[SHARES[name]] = 100 * float(value)
            elif name in PERCENTS:
                found[PERCENTS[name]] = float(value)
    return found


def _last(path: Path) -> dict[str, Any]:
    """Return the object that the file is, or the last of its lines that holds known numbers."""
    text = path.read_text("utf-8", "replace")
    try:
        return parse_json(text, dict[str, Any], str(path))
    except ValueError:
        pass
    for line in reversed(text.splitlines()):
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and known_numbers(content):
            return content
    return {}
