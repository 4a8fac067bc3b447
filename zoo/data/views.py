"""How one image becomes a view: crops, mirror images, and what stands in for an unreadable one."""

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


TRIES = 16


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image becomes a square: a random crop in training, the centre in evaluation."""

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    """Share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def train(self, data: bytes, draws: np.random.Generator) -> np.ndarray:
        """Crop, maybe mirror, and resize to [3 size size] bytes."""
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
        """Take the largest centred square and resize it to [3 size size] bytes."""
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return self._resize(image, (left, top, left + side, top + side))

    def _resize(self, image: Image.Image, box: tuple[float, ...]) -> np.ndarray:
        width = image.size[0]
        # a JPEG can be decoded at 1/2, 1/4 or 1/8; never below the size that the crop needs
        need = self.size / min(box[2] - box[0], box[3] - box[1])
        image.draft("RGB", tuple(math.ceil(need * side) for side in image.size))
        shrunk = image.size[0] / width
        box = tuple(min(edge * shrunk, image.size[i % 2]) for i, edge in enumerate(box))
        image = image.convert("RGB")
        image = image.resize((self.size,) * 2, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return np.asarray(image).transpose(2, 0, 1)


class Views(Dataset):
    """Samples by (position, index); an unreadable one is replaced by its next neighbour.

    The replacement depends on the files alone, so a resumed run makes the same one.
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
