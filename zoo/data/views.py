"""How an image becomes a view: crops, mirroring, and the replacement of an unreadable image."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from zoo.data.plan import Plan
from zoo.data.sources import Source

UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)
"""Errors by which PIL refuses a file."""

TRIES = 16
"""Most files in a row that may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image becomes a square: a random crop in training, the centre in evaluation."""

    size: int
    """Side of the square in pixels."""
    scale: tuple[float, float] = (0.5, 1.0)
    """Least and largest share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest ratio of a crop's width to its height."""
    flip: float = 0.5
    """Probability of mirroring."""

    def train(self, data: bytes, draws: np.random.Generator) -> np.ndarray:
        """Crop at random, mirror with the probability `flip`, resize to [3 size size] bytes.

        Args:
            data: An encoded image.

        Raises:
            OSError, ValueError, SyntaxError: it cannot be decoded (see `UNREADABLE`).
        """
        area, aspect, x, y, mirror = draws.random(5)
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        share = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = (math.log(r) for r in self.ratio)
        aspect = math.exp(low + aspect * (high - low))
        w = min(width, math.sqrt(share * width * height * aspect))
        h = min(height, math.sqrt(share * width * height / aspect))
        box = (x * (width - w), y * (height - h), x * (width - w) + w, y * (height - h) + h)
        pixels = self._resize(image, box)
        return pixels[:, :, ::-1] if mirror < self.flip else pixels

    def evaluate(self, data: bytes) -> np.ndarray:
        """Take the largest centred square and resize it to [3 size size] bytes.

        Args:
            data: An encoded image.

        Raises:
            OSError, ValueError, SyntaxError: it cannot be decoded (see `UNREADABLE`).
        """
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return self._resize(image, (left, top, left + side, top + side))

    def _resize(self, image: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
        width, height = image.size
        # a JPEG can be decoded at 1/2, 1/4 or 1/8; never below the size that the crop needs
        need = self.size / min(box[2] - box[0], box[3] - box[1])
        image.draft("RGB", (math.ceil(need * width), math.ceil(need * height)))
        shrunk, (cols, rows) = image.size[0] / width, image.size
        left, top, right, bottom = (edge * shrunk for edge in box)
        box = (min(left, cols), min(top, rows), min(right, cols), min(bottom, rows))
        size = (self.size, self.size)
        image = image.convert("RGB")
        image = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return np.asarray(image).transpose(2, 0, 1)


class Views(Dataset):
    """Samples by (position, index); an unreadable one is replaced by the next that can be read.

    The replacement depends on the files alone, so a resumed run makes the same one.

    Args:
        plan: Decides the crop of each position; `None` for the centre crops of an evaluation.
    """

    def __init__(self, source: Source, view: View, plan: Plan | None):
        self.source, self.view, self.plan = source, view, plan

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        skipped = []
        for number in range(min(TRIES, len(self.source))):
            chosen = (index + number) % len(self.source)
            try:
                data = self.source.read(chosen)
                if self.plan is None:
                    pixels = self.view.evaluate(data)
                else:
                    pixels = self.view.train(data, self.plan.draws(position))
            except UNREADABLE:
                skipped.append(self.source.key(chosen))
                continue
            label = self.source.label(chosen)
            return dict(
                image=torch.from_numpy(np.ascontiguousarray(pixels)),
                key=self.source.key(chosen),
                position=position,
                label=-1 if label is None else label,
                skipped=skipped,
            )
        raise ValueError(
            f"{len(skipped)} files in a row are unreadable, from {skipped[0]} on; is this the "
            "right folder?"
        )


def collate(items: list[dict]) -> dict:
    """Stack samples; names stay lists."""
    return dict(
        images=torch.stack([i["image"] for i in items]),
        labels=torch.tensor([i["label"] for i in items]),
        keys=[i["key"] for i in items],
        positions=[i["position"] for i in items],
        skipped=[name for i in items for name in i["skipped"]],
    )
