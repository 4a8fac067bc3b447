"""Images on which all models are shown side by side: the same ones, whatever a model predicts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

COUNT = 4
"""Images of a data set that are kept with each model's prediction."""
RULE = f"{COUNT} images, evenly spread over the test images, whatever a model predicts"
SIDE = 360
"""Longer side of what is kept, in pixels."""

Pixels = UInt8[np.ndarray, "H W 3"]


class Example(NamedTuple):
    """One model's prediction for such an image; truth and prediction are pixels or words."""

    key: str
    """Name of the image, the same for every model."""
    image: Pixels
    truth: Pixels | str
    prediction: Pixels | str
    score: str = ""
    """How good the prediction is: `71.3 % of pixels`."""
    right: bool | None = None
    """Of words: whether they are right."""
    legend: Sequence[tuple[str, Sequence[int]]] = ()
    """What the colours of truth and prediction mean."""


def chosen(count: int) -> list[int]:
    """Return the numbers of the images among `count`: the middles of as many equal parts."""
    kept = min(COUNT, count)
    return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]


def small(pixels: Pixels, *, smooth: bool = True) -> Image.Image:
    """Return pixels as an image of at most `SIDE` pixels a side.

    Args:
        smooth: Whether neighbours are mixed; colours that mean classes are not.
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    longer = max(image.size)
    if longer <= SIDE:
        return image
    size = tuple(max(1, round(side * SIDE / longer)) for side in image.size)
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return image.resize((size[0], size[1]), how)
