"""Pictures that are decoded once and stay on the device, where an experiment's crops are cut."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from zoo.data.feed import PlanFeed
from zoo.data.plan import Plan, mix
from zoo.data.sources import Source, open_labelled, open_splits
from zoo.data.unreadable import UNREADABLE
from zoo.data.views import View
from zoo.features import Batch

HELD_OUT = 0.2
"""Share of a data set that is held out, if it has no validation split."""


@dataclass(frozen=True)
class Pictures:
    """Square pictures of one size, with labels."""

    images: UInt8[Tensor, "n 3 S S"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        """Return a picture's name for error messages."""
        return f"picture {index}"

    def batches(self, size: int, batch: int) -> Iterator[Batch]:
        """Yield all pictures in order, uncropped, resized to `size` pixels."""
        for images, labels in zip(self.images.split(batch), self.labels.split(batch), strict=True):
            yield Batch(Batch(images).at((size, size)), labels=labels)


@dataclass(frozen=True)
class Collection:
    """All pictures of an experiment."""

    train: Pictures
    held: Pictures
    """Held-out pictures, on which students and teachers are compared."""
    probes: dict[str, tuple[Pictures, Pictures]]
    """By data set: the labelled pictures that a probe is fitted on, and those it is tested on."""
    classes: int
    """Number of classes; the labels of `train` are below it."""

    def feed(self, crop: "RandomCrop", *, batch: int, seed: int) -> "PictureFeed":
        """Return the training pictures in an order and with crops that the seed determines."""
        return PictureFeed(self.train, crop, Plan(len(self.train), batch, seed))


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Random crops, resized to squares of `size` pixels."""

    size: int
    scale: tuple[float, float] = (0.3, 1.0)
    """Least and largest share of the picture's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest ratio of a crop's width to its height."""
    flip: float = 0.0
    """Probability of mirroring."""

    def __call__(
        self, images: UInt8[Tensor, "B 3 S S"], draws: torch.Generator
    ) -> Float[Tensor, "B 3 h w"]:
        """Cut one crop out of each picture, in [0, 1]; random numbers are drawn on its device.

        Bilinear without antialiasing: the pictures are stored so small (`side_for`) that no crop
        is reduced by a factor of more than 4/3.
        """
        area, aspect, x, y, mirror = torch.rand(
            5, len(images), generator=draws, device=images.device
        )
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = (math.log(r) for r in self.ratio)
        root = torch.exp((low + aspect * (high - low)) / 2)
        wide, tall = (area.sqrt() * root).clamp(max=1), (area.sqrt() / root).clamp(max=1)
        sign = torch.where(mirror < self.flip, -1.0, 1.0)
        zero = torch.zeros_like(wide)
        # affine_grid maps the crop's [-1, 1] onto the picture's
        rows = torch.stack(
            [wide * sign, zero, (2 * x - 1) * (1 - wide), zero, tall, (2 * y - 1) * (1 - tall)], 1
        )
        shape = [len(images), 3, self.size, self.size]
        grid = F.affine_grid(rows.view(-1, 2, 3), shape, align_corners=False)
        return F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)


def side_for(size: int) -> int:
    """Return the side in pixels at which pictures are stored for crops of `size`."""
    return math.ceil(size * 4 / 3)


@dataclass
class PictureFeed(PlanFeed):
    """Pictures in the order of a plan, with crops that its seed and the step determine."""

    source: Pictures
    crop: RandomCrop
    plan: Plan

    def batches(self, start: int, steps: int) -> Iterator[Batch]:
        """Yield the crops of the steps from `start` up to `steps`: [B 3 H W] in [0, 1], labels."""
        batch, device = self.plan.batch, self.source.images.device
        positions = np.arange(start * batch, steps * batch)
        # all at once, so that no step waits for its order to reach the device
        order = torch.from_numpy(self.plan.indices_at(positions)).to(device)
        draws = torch.Generator(device)
        for step, chosen in enumerate(order.view(-1, batch), start):
            draws.manual_seed(mix(self.plan.seed, 3, step))
            images = self.crop(self.source.images[chosen], draws)
            yield Batch(images, labels=self.source.labels[chosen])


def embedded_collection(side: int, device: torch.device, limit: int | None) -> Collection:
    """Read the digits and photographs of `zoo.data.embedded`; the digits are for the probes.

    Args:
        side: Side of the pictures in pixels.
        limit: Most pictures of each split.
    """
    from zoo.data.embedded import embedded_data

    folder = embedded_data()
    train, held = open_splits(folder / "images", HELD_OUT)
    pictures = [decode(part, side, device, limit) for part in (train, held)]
    bank, queries = (
        decode(part, side, device, limit) for part in open_splits(folder / "digits", HELD_OUT)
    )
    return Collection(pictures[0], pictures[1], {"digits": (bank, queries)}, len(train.classes))


def read_collection(
    folders: Sequence[Path], side: int, device: torch.device, limit: int | None = None
) -> Collection:
    """Read data sets into one collection: the embedded ones if no folder is named.

    Args:
        folders: Data sets, each as `zoo distill --data` takes it. The classes of a data set are
            numbered after those of the one before.
        side: Side of the pictures in pixels.
        limit: Most pictures of each split, evenly spread over it.

    Raises:
        ValueError: a folder has no images, or they have no classes.
    """
    if not folders:
        return embedded_collection(side, device, limit)
    trains, helds, probes, first = [], [], {}, 0
    for folder in folders:
        sources = open_labelled(folder, HELD_OUT)
        classes = sources[0].classes
        if not classes:
            raise ValueError(
                f"{folder} has no classes, or its two splits have no common ones. The classifier "
                "teacher and the probes need them: one sub-folder a class, .cls files in the "
                "shards, or labels in the .npz."
            )
        train, held = (decode(source, side, device, limit) for source in sources)
        probes[unused_name(folder.resolve().name, probes)] = (train, held)
        trains.append(Pictures(train.images, train.labels + first))
        helds.append(Pictures(held.images, held.labels + first))
        first += len(classes)
    return Collection(_joined(trains), _joined(helds), probes, first)


def decode(source: Source, side: int, device: torch.device, limit: int | None = None) -> Pictures:
    """Decode the centre squares of a source's images, on as many threads as there are cores.

    Args:
        side: Side of the squares in pixels.
        limit: Most images, evenly spread over the source.

    Raises:
        ValueError: an image cannot be read.
    """
    count = len(source)
    chosen = np.arange(count)
    if limit is not None and limit < count:
        # spread: sources are often sorted by class
        chosen = np.linspace(0, count - 1, limit).astype(int)
    view = View(size=side)

    def one(index: int) -> np.ndarray:
        try:
            return view.evaluate(source.read(int(index)))
        except UNREADABLE as error:
            raise ValueError(f"{source.key(int(index))} cannot be read: {error}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(one, chosen)))
    labels = [source.label(int(i)) for i in chosen]
    return Pictures(torch.from_numpy(images).to(device), torch.tensor(labels, device=device))


def _joined(parts: Sequence[Pictures]) -> Pictures:
    return Pictures(
        torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    )


def unused_name(name: str, taken: Mapping[str, object]) -> str:
    """Return a name that no other data set has: of a second `birds`, `birds_2`."""
    while name in taken:
        name += "_2"
    return name
