"""Intersection over union of classes, counted image by image."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from zoo.eval.registry import Scores


class Confusion:
    """Counts of pixels by their true and their predicted class.

    Pixels whose truth is `ignore` are not counted.

    Raises:
        ValueError: there is no class, or more than `ignore` of them.
    """

    def __init__(self, classes: Sequence[str], *, ignore: int = 255):
        if not classes or len(classes) > ignore:
            raise ValueError(f"There are {len(classes)} classes; there must be 1 to {ignore}.")
        self.classes, self.ignore = tuple(classes), ignore
        self.rows: list[Tensor] = []
        """Per image [3, classes]: pixels of intersection, truth and prediction."""
        self.keys: list[str] = []

    def add(self, truth: Integer[Tensor, "..."], guess: Integer[Tensor, "..."], key: str) -> None:
        """Count the pixels of one image; both arguments are indices of classes.

        Raises:
            ValueError: truth and guess have different shapes.
        """
        if truth.shape != guess.shape:
            raise ValueError(
                f"The truth is {tuple(truth.shape)} and the guess {tuple(guess.shape)}."
            )
        count = len(self.classes)
        truth, guess = truth.flatten().long(), guess.flatten().long().to(truth.device)
        # pixels that are not scored go into an extra cell, so that nothing waits for their number
        cell = torch.where(truth == self.ignore, count * count, truth * count + guess)
        table = torch.bincount(cell, minlength=count * count + 1)[:-1].view(count, count)
        self.rows.append(torch.stack([table.diagonal(), table.sum(dim=1), table.sum(dim=0)]))
        self.keys.append(key)

    def sums(self) -> np.ndarray:
        """Return [n, 3, classes]: intersection, pixels of the truth, pixels of the prediction.

        Raises:
            ValueError: no image was counted.
        """
        if not self.rows:
            raise ValueError("No image was counted, so there is no intersection over union.")
        return torch.stack(self.rows).cpu().numpy()

    def values(self, name: str) -> Iterator[tuple[str, float | Scores]]:
        """Yield mIoU, mean accuracy of classes, accuracy of pixels and the IoU of each class.

        All are in per cent. A class that neither truth nor prediction has is left out. Sums run
        over all images before the division, as in VOC and ADE20k.
        """
        sums = self.sums()
        hits, truth, guess = (sums[:, i] for i in range(3))
        yield f"{name}/miou", Scores(self.keys, hits, truth + guess - hits)
        yield f"{name}/mean_accuracy", Scores(self.keys, hits, truth)
        yield f"{name}/pixel_accuracy", Scores(self.keys, hits.sum(axis=1), truth.sum(axis=1))
        total, union = hits.sum(axis=0), (truth + guess - hits).sum(axis=0)
        for i, label in enumerate(self.classes):
            if union[i]:
                yield f"{name}/class/{label}", 100 * total[i].item() / union[i].item()
