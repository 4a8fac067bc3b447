"""Intersection over union of classes, image by image."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from zoo.eval.registry import Scores


class Confusion:
    """Counts of pixels: what they are, what they are taken for.

    Pixels whose truth is no class (`ignore`) count for nothing, whatever they are taken for.
    """

    def __init__(self, classes: Sequence[str], *, ignore: int = 255):
        if not classes or len(classes) > ignore:
            raise ValueError(f"{len(classes)} classes came; there must be 1 to {ignore}.")
        self.classes, self.ignore = tuple(classes), ignore
        self.rows: list[Tensor] = []
        """For each image intersections, truths and guesses [3, classes], on the device."""
        self.keys: list[str] = []

    def add(self, truth: Integer[Tensor, "..."], guess: Integer[Tensor, "..."], key: str) -> None:
        """Count one image.

        Raises:
            ValueError: truth and guess are not of one shape.
        """
        if truth.shape != guess.shape:
            raise ValueError(
                f"The truth is {tuple(truth.shape)} and the guess {tuple(guess.shape)}."
            )
        count = len(self.classes)
        truth, guess = truth.flatten().long(), guess.flatten().long().to(truth.device)
        # what is not scored falls into a further cell, so that nothing waits for a count of it
        cell = torch.where(truth == self.ignore, count * count, truth * count + guess)
        table = torch.bincount(cell, minlength=count * count + 1)[:-1].view(count, count)
        self.rows.append(torch.stack([table.diagonal(), table.sum(dim=1), table.sum(dim=0)]))
        self.keys.append(key)

    def sums(self) -> np.ndarray:
        """Return [n, 3, classes]: intersections, pixels of the truth, pixels of the guess.

        Raises:
            ValueError: no image was counted.
        """
        if not self.rows:
            raise ValueError("No image was counted; there is no intersection over union of none.")
        return torch.stack(self.rows).cpu().numpy()

    def values(self, name: str) -> Iterator[tuple[str, float | Scores]]:
        """Yield mIoU, mean accuracy of classes and accuracy of pixels, then each class, per cent.

        A class that neither truth nor guess holds is left out; sums run over all images before
        anything is divided, as in VOC and ADE20k.
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
