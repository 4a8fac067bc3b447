"""Images of any size on square canvases: the input of every detector here."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.images import read_rgb, to_rgb
from zoo.data.unreadable import Lost, read_next, try_read
from zoo.eval.detect.coco import CocoImage, CocoSplit
from zoo.eval.detect.masks import decode

GRID = 32
"""A canvas's side is a multiple of this, the coarsest stride of a pyramid."""


@dataclass(frozen=True)
class Truth:
    """The objects of one image, in pixels of the canvas."""

    boxes: Float[Tensor, "n 4"]
    """Left, top, right, bottom."""
    labels: Tensor
    masks: UInt8[Tensor, "n S S"] | None = None

    def to(self, device: torch.device) -> "Truth":
        """Return the same objects on a device."""
        boxes, labels = (x.to(device, non_blocking=True) for x in (self.boxes, self.labels))
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return Truth(boxes, labels, masks)


@dataclass(frozen=True)
class Canvas:
    """A batch of images, each scaled to fit into S x S pixels and placed in the upper left corner.

    All batches have the same shape, so a backbone's windows and tables are built once.
    """

    images: UInt8[Tensor, "B 3 S S"]
    sizes: tuple[tuple[int, int], ...]
    """Rows and columns that each image covers."""
    originals: tuple[tuple[int, int], ...]
    """Rows and columns of the images as they were read."""
    truths: tuple[Truth, ...] = ()
    indices: tuple[int, ...] = ()
    """Indices of the images in the split."""
    lost: tuple[Lost, ...] = ()
    """Those that could not be read."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Canvas":
        """Return the same batch on a device."""
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, truths=tuple(t.to(device) for t in self.truths))

    def covered(self) -> Bool[Tensor, "B S S"]:
        """Return which pixels belong to the images, and not to the empty canvas."""
        side = torch.arange(self.images.shape[-1], device=self.images.device)
        rows, cols = torch.tensor(self.sizes).to(side.device, non_blocking=True).T
        return (side < rows[:, None])[:, :, None] & (side < cols[:, None])[:, None]

    def normalised(self, mean: Tensor, std: Tensor) -> Float[Tensor, "B 3 S S"]:
        """Return the images normalised for a backbone; the empty canvas is 0."""
        images = (self.images.float() / 255 - mean[:, None, None]) / std[:, None, None]
        return images * self.covered()[:, None]


def fit(rows: int, cols: int, side: int) -> tuple[int, int]:
    """Return the rows and columns of an image after its longer side is resized to `side`."""
    scale = side / max(rows, cols)
    return max(1, round(rows * scale)), max(1, round(cols * scale))


def place(image: Image.Image, side: int) -> tuple[UInt8[Tensor, "3 S S"], tuple[int, int]]:
    """Scale an image to a canvas; return the canvas, and the image's rows and columns in it."""
    rows, cols = fit(image.height, image.width, side)
    pixels = np.asarray(to_rgb(image).resize((cols, rows), Image.Resampling.BILINEAR))
    canvas = torch.zeros(3, side, side, dtype=torch.uint8)
    canvas[:, :rows, :cols] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return canvas, (rows, cols)


def on_canvas(images: Sequence[Image.Image], side: int) -> Canvas:
    """Put images on canvases, turned as their EXIF orientation says."""
    upright = [ImageOps.exif_transpose(image) for image in images]
    canvases, sizes = zip(*(place(image, side) for image in upright), strict=True)
    originals = tuple((image.height, image.width) for image in upright)
    return Canvas(torch.stack(canvases), sizes, originals)


class Samples(Dataset):
    """The images of a split on canvases, each with its objects, by (index, mirrored).

    An unreadable one is replaced by the next that can be read.

    Args:
        keep: Keep decoded images in memory, for sets of a few hundred images.
    """

    def __init__(self, split: CocoSplit, side: int, *, masks: bool, keep: bool = False):
        self.split, self.side, self.masks = split, side, masks
        self.kept: dict[int, Canvas] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, bool]) -> Canvas:
        index, mirrored = item
        if self.kept is None:
            sample = self._sample(index)
        else:
            if index not in self.kept:
                self.kept[index] = self._sample(index)
            sample = self.kept[index]
        return _mirrored(sample) if mirrored else sample

    def _sample(self, index: int) -> Canvas:
        sample, lost = read_next(self.split, index, self._read)
        return replace(sample, lost=tuple(lost))

    def _read(self, index: int) -> Canvas:
        image = self.split.images[index]
        # as stored: boxes and masks of COCO's form refer to these pixels
        canvas, size = place(read_rgb(image.path, upright=False), self.side)
        truth = self._truth(image, size)
        return Canvas(canvas[None], (size,), ((image.rows, image.cols),), (truth,), (index,))

    def _truth(self, image: CocoImage, size: tuple[int, int]) -> Truth:
        scale = torch.tensor([size[1] / image.cols, size[0] / image.rows]).repeat(2)
        limit = torch.tensor([size[1], size[0]]).repeat(2)
        objects = self.split.objects(image)
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) * scale
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        big = (boxes[:, 2:] - boxes[:, :2]).amin(
            dim=1
        ) > 0.5  # smaller ones are left out of the training
        labels = torch.tensor([self.split.label(a) for a in objects], dtype=torch.int64)
        masks = None
        if self.masks:
            masks = torch.zeros(len(objects), self.side, self.side, dtype=torch.uint8)
            for mask, annotation in zip(masks, objects, strict=True):
                drawn = decode(annotation["segmentation"], image.rows, image.cols, size=size)
                mask[: size[0], : size[1]] = torch.from_numpy(np.array(drawn))
            masks = masks[big]
        return Truth(boxes[big], labels[big], masks)


class LeftOut(Samples):
    """The same for an evaluation: an unreadable image is left out, and its canvas is empty."""

    def _sample(self, index: int) -> Canvas:
        found = try_read(self.split, index, self._read)
        if isinstance(found, Canvas):
            return found
        nothing = torch.zeros(0, 3, self.side, self.side, dtype=torch.uint8)
        return Canvas(nothing, (), (), lost=(found,))


def _mirrored(sample: Canvas) -> Canvas:
    """Mirror one image inside the part of the canvas that it covers."""
    (truth,), cols = sample.truths, sample.sizes[0][1]
    boxes = truth.boxes.clone()
    boxes[:, [0, 2]] = cols - truth.boxes[:, [2, 0]]
    masks = None if truth.masks is None else _turned(truth.masks, cols)
    turned = Truth(boxes, truth.labels, masks)
    return replace(sample, images=_turned(sample.images, cols), truths=(turned,))


def _turned(x: Tensor, cols: int) -> Tensor:
    return torch.cat([x[..., :cols].flip(-1), x[..., cols:]], dim=-1)


def joined(samples: Sequence[Canvas]) -> Canvas:
    """Concatenate several batches."""
    return Canvas(
        torch.cat([sample.images for sample in samples]),
        tuple(size for sample in samples for size in sample.sizes),
        tuple(size for sample in samples for size in sample.originals),
        tuple(truth for sample in samples for truth in sample.truths),
        tuple(index for sample in samples for index in sample.indices),
        tuple(one for sample in samples for one in sample.lost),
    )


def batches(
    samples: Samples, order: Iterable[list[tuple[int, bool]]], *, workers: int = 0
) -> Iterator[Canvas]:
    """Yield the batches of `order`, decoded in worker processes if there are any."""
    sampler: Any = order  # a DataLoader iterates over it without needing its length
    yield from DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=joined,
        num_workers=workers,
        worker_init_fn=_leave_signals,
    )


def _leave_signals(_: int) -> None:
    """Ignore Ctrl-C in a worker: the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
