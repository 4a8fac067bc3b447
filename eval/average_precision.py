"""Average precision: one ranking of all images' answers, made anew for any choice of images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads a curve of precision."""
AT_ONCE = 2**21
"""Draws times predictions that are held at once."""


class AveragePrecision(NamedTuple):
    """An average precision with what each image adds to it, so that two models can be compared.

    It is no mean over images: all predictions of a class stand in one ranking. They are kept
    here in that order, the best first; a draw of images is a weight an image, and the curve is
    made of weighted sums along the ranking. Predictions that count nowhere need not be kept.
    """

    keys: Sequence[str]
    """Names of the images, the same for every model."""
    image: np.ndarray
    """[p]: the place in `keys` of each prediction's image; predictions are sorted by class, and
    by falling score within a class."""
    label: np.ndarray
    """[p]: the class of each prediction."""
    right: np.ndarray
    """[p, thresholds], booleans: it has found an object of its own."""
    counted: np.ndarray
    """[p, thresholds], booleans: it is right or wrong; others found a crowd, or another size."""
    objects: np.ndarray
    """[n, classes]: how many objects each image has to find."""

    @property
    def value(self) -> float:
        """The number itself, in per cent."""
        return float(self.over(np.ones((1, len(self.keys))))[0])

    def over(self, weights: Shaped[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        """Return the number in per cent, once for each row of weights of the images.

        An image of weight 2 counts as two copies of it would. A class without any object is left
        out, as COCO does; where no class has one the number is NaN.
        """
        weights = np.asarray(weights, np.float64)
        objects = weights @ self.objects.astype(np.float64)
        ends = np.searchsorted(self.label, np.arange(objects.shape[1] + 1))
        total = np.zeros(len(weights))
        for label, (start, end) in enumerate(pairwise(ends)):
            hits = np.flatnonzero(self.right[start:end].any(axis=1))
            if not len(hits):
                continue
            some = slice(start, start + hits[-1] + 1)  # what comes later changes no precision
            step = max(1, AT_ONCE // (some.stop - some.start))
            for first in range(0, len(weights), step):
                rows = slice(first, first + step)
                ranking = weights[rows].take(self.image[some], axis=1)
                total[rows] += _interpolated(
                    ranking, self.right[some], self.counted[some], objects[rows, label]
                )
        present = (objects > 0).sum(axis=1)
        return np.where(present > 0, 100 * total / np.maximum(present, 1), np.nan)


def _interpolated(
    ranking: np.ndarray, right: np.ndarray, counted: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """Return one class's precision, mean over COCO's recalls and the thresholds, a draw a row.

    The precision at a recall is the best one at it or beyond, which some right prediction has:
    only they are looked at.
    """
    total, counted_so_far = np.zeros(len(ranking)), np.zeros(0)
    for t in range(right.shape[1]):
        if not t or (counted[:, t] != counted[:, t - 1]).any():
            counted_so_far = np.cumsum(ranking * counted[:, t], axis=1)
        hits = np.flatnonzero(right[:, t])
        found = np.cumsum(ranking[:, hits], axis=1)
        precision = found / (counted_so_far[:, hits] + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = found / np.maximum(objects, 1)[:, None]
        read = np.searchsorted(RECALLS, recall, side="right")
        total += (best * np.diff(read, axis=1, prepend=0)).sum(axis=1)
    return total / (right.shape[1] * len(RECALLS))
