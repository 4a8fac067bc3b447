"""How an image becomes a view: crops, mirroring, and the replacement of an unreadable image."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from zoo.data.images import EncodedImage, PlainJpeg, open_image
from zoo.data.plan import Plan
from zoo.data.sources import Source
from zoo.data.unreadable import Lost, read_next, try_read


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
    decoder: Literal["pillow", "torch"] = "pillow"
    """What decodes and resizes in training. torch (libjpeg-turbo through simplejpeg or torchvision,
    which give the same bytes; torch's resizing of bytes) takes two thirds of Pillow's time; its
    crops begin and end between pixels of the image."""

    def described(self) -> dict[str, Any]:
        """Return the fields as plain data; without Pillow's decoder, which older caches lack."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if (k, v) != ("decoder", "pillow")}

    def train(self, data: bytes, draws: np.random.Generator) -> np.ndarray:
        """Crop at random, mirror with the probability `flip`, resize to [3 size size] bytes.

        Args:
            data: An encoded image.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        area, aspect, x, y, mirror = draws.random(5)
        image = EncodedImage(data) if self.decoder == "pillow" else open_image(data)
        width, height = image.size
        share = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = (math.log(r) for r in self.ratio)
        aspect = math.exp(low + aspect * (high - low))
        w = min(width, math.sqrt(share * width * height * aspect))
        h = min(height, math.sqrt(share * width * height / aspect))
        box = (x * (width - w), y * (height - h), x * (width - w) + w, y * (height - h) + h)
        resize = self._resize if self.decoder == "pillow" else self._resize_by_torch
        pixels = resize(image, box)
        return pixels[:, :, ::-1] if mirror < self.flip else pixels

    def evaluate(self, data: bytes) -> np.ndarray:
        """Take the largest centred square and resize it to [3 size size] bytes.

        Args:
            data: An encoded image.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        image = EncodedImage(data)
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return self._resize(image, (left, top, left + side, top + side))

    def _resize(
        self, image: PlainJpeg | EncodedImage, box: tuple[float, float, float, float]
    ) -> np.ndarray:
        # never below the size that the crop needs
        rgb = image.rgb(self.size / min(box[2] - box[0], box[3] - box[1]))
        shrunk, (cols, rows) = rgb.width / image.size[0], rgb.size
        left, top, right, bottom = (edge * shrunk for edge in box)
        box = (min(left, cols), min(top, rows), min(right, cols), min(bottom, rows))
        size = (self.size, self.size)
        rgb = rgb.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return np.asarray(rgb).transpose(2, 0, 1)

    def _resize_by_torch(
        self, image: PlainJpeg | EncodedImage, box: tuple[float, float, float, float]
    ) -> np.ndarray:
        if self.size / min(box[2] - box[0], box[3] - box[1]) <= 1 / 2:
            return self._resize(image, box)  # a JPEG that is decoded smaller, which Pillow can
        pixels = image.pixels()
        rows, cols = pixels.shape[1:]
        left, top, right, bottom = map(round, box)
        left, top = min(left, cols - 1), min(top, rows - 1)
        part = pixels[:, top : max(bottom, top + 1), left : max(right, left + 1)]
        size = (self.size, self.size)
        resized = F.interpolate(part[None], size, mode="bicubic", antialias=True)
        return resized[0].numpy()


@dataclass(frozen=True)
class Views(Dataset):
    """Training views by (position, index); the plan decides the crop of each position.

    An unreadable image is replaced by the next that can be read; see `read_next`.
    """

    source: Source
    view: View
    plan: Plan

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item

        def read(chosen: int) -> tuple[int, np.ndarray]:
            return chosen, self.view.train(self.source.read(chosen), self.plan.draws(position))

        (chosen, pixels), lost = read_next(self.source, index, read)
        return _sample(self.source, chosen, pixels, position, [one.key for one in lost])


@dataclass(frozen=True)
class Centres(Dataset):
    """Centre crops by index, for evaluations; an unreadable image is `Lost`."""

    source: Source
    view: View

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        pixels = try_read(self.source, index, lambda i: self.view.evaluate(self.source.read(i)))
        if isinstance(pixels, Lost):
            return dict(image=None, lost=pixels, skipped=[])
        return _sample(self.source, index, pixels, index, [])


def _sample(
    source: Source, index: int, pixels: np.ndarray, position: int, skipped: list[str]
) -> dict:
    label = source.label(index)
    return dict(
        image=torch.from_numpy(np.ascontiguousarray(pixels)),
        key=source.key(index),
        position=position,
        label=-1 if label is None else label,
        skipped=skipped,
    )


def collate(items: list[dict]) -> dict:
    """Stack samples, without the unreadable ones; names stay lists."""
    read = [i for i in items if i["image"] is not None]
    return dict(
        images=torch.stack([i["image"] for i in read]) if read else None,
        labels=torch.tensor([i["label"] for i in read], dtype=torch.long),
        keys=[i["key"] for i in read],
        positions=[i["position"] for i in read],
        skipped=[name for i in items for name in i["skipped"]],
        lost=[i["lost"] for i in items if i["image"] is None],
    )
