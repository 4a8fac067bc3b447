"""Masks in COCO's formats: polygons, run lengths as numbers, and run lengths as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

NEEDED = "COCO masks and metrics need faster-coco-eval: pip install 'backbone-zoo[det]'."


def _codec() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ValueError(NEEDED) from error
    return mask


def is_coordinate(x: Any) -> bool:
    """Return whether it is a number, and one that float32 holds to a pixel."""
    return isinstance(x, int | float) and abs(x) < 2**24


def problem_of(segmentation: Any, rows: int, cols: int) -> str | None:
    """Return why `segmentation` is not a mask for an image of `rows` x `cols`; `None` if it is."""
    if isinstance(segmentation, Mapping):
        return _problem_of_runs(segmentation, rows, cols)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        return f"a {type(segmentation).__name__} where polygons or run lengths belong"
    for polygon in segmentation:
        if not isinstance(polygon, Sequence) or isinstance(polygon, str):
            return "a polygon that is not a list of numbers"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon of {len(polygon)} numbers; x, y of three or more points are needed"
        if not all(is_coordinate(x) and abs(x) < 4 * max(rows, cols) for x in polygon):
            return "a polygon with a coordinate that is no number, or far outside of the image"
    return None


def _problem_of_runs(runs: Mapping[str, Any], rows: int, cols: int) -> str | None:
    size, counts = runs.get("size"), runs.get("counts")
    if not isinstance(size, Sequence) or list(size) != [rows, cols]:
        return f"run lengths of size {size}; the image has {rows} rows and {cols} columns"
    if isinstance(counts, str | bytes):
        try:
            _codec().decode(dict(size=[rows, cols], counts=_bytes(counts)))
        except (ValueError, RuntimeError, IndexError) as error:
            return f"run lengths as text that cannot be read ({error})"
        return None
    if not isinstance(counts, Sequence) or not all(isinstance(n, int) and n >= 0 for n in counts):
        return "run lengths that are neither text nor a list of counts"
    if sum(counts) != rows * cols:
        return f"run lengths over {sum(counts)} pixels; the image has {rows * cols}"
    return None


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def decode(
    segmentation: Any, rows: int, cols: int, *, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Return a mask as uint8 [rows cols] of 0 and 1, at `size` or at the image's own size.

    Polygons are scaled before they are drawn, so they are rounded to pixels only once.

    Args:
        size: Rows and columns of the result.

    Raises:
        ValueError: faster-coco-eval is not installed.
    """
    codec = _codec()
    height, width = size or (rows, cols)
    if not isinstance(segmentation, Mapping):
        if not segmentation:
            return np.zeros((height, width), np.uint8)
        scale = np.array([width / cols, height / rows])
        drawn = [(np.reshape(p, (-1, 2)) * scale).ravel().tolist() for p in segmentation]
        return codec.decode(codec.merge(codec.frPyObjects(drawn, height, width)))
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        runs = dict(size=[rows, cols], counts=_bytes(counts))
    else:
        runs = codec.frPyObjects(dict(size=[rows, cols], counts=list(counts)), rows, cols)
    mask = codec.decode(runs)
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Return boolean masks [n rows cols] as run lengths in text, which JSON can hold."""
    if not len(masks):
        return []
    stacked = np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0))
    return [
        dict(size=list(map(int, runs["size"])), counts=_text(runs["counts"]))
        for runs in _codec().encode(stacked)
    ]


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
