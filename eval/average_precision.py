"""Average precision, kept so that it can be recomputed for any choice of images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which COCO samples the curve of precision over recall."""
AT_ONCE = 2**21
"""Draws times predictions that are in memory at once."""


class AveragePrecision(NamedTuple):
    """An average precision with each image's part in it, so that two models can be compared.

    It is not a mean over images: all predictions of a class are in one ranking. They are kept
    here in that order, the best first. A choice of images is a weight for each image, and the
    curve of precision follows from weighted sums along the ranking. Predictions that do not count
    at any threshold can be left out.
    """

    keys: Sequence[str]
    """Names of the images; the same for every model."""
    image: np.ndarray
    """[p]: the index in `keys` of each prediction's image. Predictions are sorted by class, and
    within a class by falling score."""
    label: np.ndarray
    """[p]: the class of each prediction."""
    right: np.ndarray
    """[p, thresholds], booleans: the prediction matches an object that is not taken yet."""
    counted: np.ndarray
    """[p, thresholds], booleans: the prediction counts as right or wrong; others matched a crowd,
    or an object of another range of sizes."""
    objects: np.ndarray
    """[n, classes]: number of objects in each image."""

    @property
    def value(self) -> float:
        """The number, in per cent."""
        return float(self.over(np.ones((1, len(self.keys))))[0])

    def over(self, weights: Shaped[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        """Return the number in per cent for each row of weights of the images.

        An image of weight 2 counts like two copies of it. A class without objects is left out, as
        COCO does; where no class has any, the number is NaN.
        """
        weights = np.asarray(weights, np.float64)
        objects = weights @ self.objects.astype(np.float64)
        ends = np.searchsorted(self.label, np.arange(objects.shape[1] + 1))
        total = np.zeros(len(weights))
        for label, (start, end) in enumerate(pairwise(ends)):
            hits = np.flatnonzero(self.right[start:end].any(axis=1))
            if not len(hits):
                continue
            some = slice(start, start + hits[-1] + 1)  # later predictions change no precision
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
    """Return one class's precision for each draw: the mean over COCO's recalls and the thresholds.

    The precision at a recall is the best one at that recall or above it. A right prediction has
    it, so only those are evaluated.
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
