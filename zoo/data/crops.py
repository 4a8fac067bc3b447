"""Training crops for dense tasks: an image with a target for each of its pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.feed import PlanFeed
from zoo.data.loader import PlanSampler
from zoo.data.plan import Plan
from zoo.data.unreadable import Lost, read_next, readable, try_read
from zoo.features import Batch

GREY = 124
"""The value of pixels outside of an image that is smaller than its crop; near all models' means."""
TRIES = 10
"""Positions that are tried for a crop that is not dominated by one class."""


@runtime_checkable
class DenseSource(Protocol):
    """Images with a target for each pixel: a class, or a depth."""

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def image(self, index: int) -> Image.Image: ...
    def target(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """How a random square of `side` pixels is cut from an image.

    The image's short side is first resized to `side` times a random number from `scale`.
    """

    side: int
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    """Probability of mirroring."""
    fill: float = 0.75
    """Largest share of the scored pixels for one class; 1 for no limit, as for depths."""
    nothing: float = 255
    """The value of a target where it is unknown."""

    def draw(
        self, image: Image.Image, target: np.ndarray, draws: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "3 side side"], Shaped[np.ndarray, "side side"]]:
        """Cut a random square from an image (bicubic) and from its target (nearest neighbour).

        Return uint8 pixels [3 side side] and the target [side side].
        """
        width, height = image.size
        zoom = self.side / min(width, height) * draws.uniform(*self.scale)
        positions = draws.random((TRIES, 2))
        mirror = draws.random() < self.flip
        wide, high = max(1, round(width * zoom)), max(1, round(height * zoom))
        w, h = min(self.side, wide), min(self.side, high)
        left, top, cut = 0, 0, target[:0]
        for x, y in positions:
            left, top = int(x * (wide - w + 1)), int(y * (high - h + 1))
            cols = ((left + np.arange(w) + 0.5) * width / wide).astype(int)
            rows = ((top + np.arange(h) + 0.5) * height / high).astype(int)
            cut = target[rows[:, None], cols]
            if self.fill >= 1 or _widest(cut[cut != self.nothing]) < self.fill:
                break
        right, bottom = (left + w) * width / wide, (top + h) * height / high
        box = (left * width / wide, top * height / high, min(right, width), min(bottom, height))
        pixels = np.full((self.side, self.side, 3), GREY, np.uint8)
        known = np.full((self.side, self.side), self.nothing, target.dtype)
        small = image.resize((w, h), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        pixels[:h, :w] = np.asarray(small)
        known[:h, :w] = cut
        if mirror:
            pixels, known = pixels[:, ::-1], known[:, ::-1]
        return pixels.transpose(2, 0, 1).copy(), known.copy()


def _widest(values: np.ndarray) -> float:
    """Return the share of the most common value; 1 if there are no values."""
    return np.unique(values, return_counts=True)[1].max() / values.size if values.size else 1.0


class Crops(Dataset):
    """Samples by (position, index); randomness depends only on the plan and the position.

    Each comes with the unreadable ones whose place it takes.
    """

    def __init__(self, source: DenseSource, crop: CropSpec, plan: Plan):
        self.source, self.crop, self.plan = source, crop, plan

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, list[Lost]]:
        position, index = item

        def cut(index: int) -> tuple[np.ndarray, np.ndarray]:
            draws = self.plan.draws(position)
            return self.crop.draw(self.source.image(index), self.source.target(index), draws)

        (pixels, target), lost = read_next(self.source, index, cut)
        return pixels, target, lost


def _stacked(
    items: Sequence[tuple[np.ndarray, np.ndarray, list[Lost]]],
) -> tuple[Tensor, Tensor, list[str]]:
    pixels, targets = (torch.from_numpy(np.stack([item[i] for item in items])) for i in (0, 1))
    return pixels, targets, [lost.key for item in items for lost in item[2]]


class Whole(Dataset):
    """Indices, whole images and targets for an evaluation; an unreadable pair is `Lost`."""

    def __init__(self, source: DenseSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor] | Lost:
        return try_read(self.source, index, self._read)

    def _read(self, index: int) -> tuple[int, Tensor, Tensor]:
        pixels = np.asarray(self.source.image(index)).transpose(2, 0, 1).copy()
        target = self.source.target(index)
        return index, torch.from_numpy(pixels)[None], torch.from_numpy(target)[None]


def _alone(items: Sequence[Any]) -> Any:
    return items[0]


class CropBatch(NamedTuple):
    """Crops, and a target for each of their pixels."""

    images: Batch
    target: Shaped[Tensor, "B s s"]


@dataclass
class CropFeed(PlanFeed):
    """Crops of a source's images in the order of a plan; the same ones for any `workers`."""

    source: DenseSource
    crop: CropSpec
    plan: Plan
    device: torch.device
    workers: int = 0

    def batches(self, start: int, steps: int) -> Iterator[CropBatch]:
        """Yield the crops of each step from `start` to before `steps`."""
        loader = DataLoader(
            Crops(self.source, self.crop, self.plan),
            batch_sampler=PlanSampler(self.plan, start, steps),
            collate_fn=_stacked,
            **loading(self.device, self.workers),
        )
        for pixels, target, skipped in loader:
            self._skipped = (*self._skipped, *skipped)
            yield CropBatch(
                Batch(pixels).to(self.device), target.to(self.device, non_blocking=True)
            )


def whole_images(
    source: DenseSource, *, unreadable: set[str] | None = None, **loading: Any
) -> Iterator[tuple[int, UInt8[Tensor, "1 3 H W"], Shaped[Tensor, "1 H W"]]]:
    """Yield the index, the image and the target of each pair that can be read.

    Args:
        unreadable: Takes the names of the others, as in `zoo.data.unreadable.readable`.
    """
    loader = DataLoader(Whole(source), batch_size=1, collate_fn=_alone, **loading)
    return readable(loader, unreadable)


def some_pairs(
    source: DenseSource, most: int, unreadable: set[str] | None
) -> Iterator[tuple[int, np.ndarray, tuple[int, int]]]:
    """Yield index, target and the image's size of `most` pairs at even distances, for a check."""

    def read(index: int) -> tuple[int, np.ndarray, tuple[int, int]]:
        return index, source.target(index), source.image(index).size

    indices = np.unique(np.linspace(0, len(source) - 1, most).astype(int)).tolist()
    return readable((try_read(source, index, read) for index in indices), unreadable)


def loading(device: torch.device, workers: int) -> dict[str, Any]:
    """Return the common keywords of the loaders of images."""
    # its own generator: otherwise the loader would draw from the global one
    return dict(num_workers=workers, pin_memory=device.type == "cuda", generator=torch.Generator())
