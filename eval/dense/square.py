"""Image files as batches of squares, for benchmarks with their own lists of images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from zoo.data.images import printable, read_rgb
from zoo.data.unreadable import readable, try_read
from zoo.features import Batch


@dataclass(frozen=True)
class Squares:
    """Image files as batches of squares of `side` pixels, in order.

    A batch's `keys` are the names of its files, and `positions` their indices in `files`.

    Args:
        whole: Resize the whole image, as it is stored, to a square: points in it are shares of its
            sides. Otherwise its largest centred square is taken, upright.
        unreadable: Takes the names of the files that are left out; see `readable`.
        share: Which of how many shares: of the batches, were all files readable, every so many-th.
    """

    files: Sequence[Path]
    side: int
    batch: int
    device: torch.device
    whole: bool = False
    unreadable: set[str] = field(default_factory=set)
    share: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return printable(str(self.files[index]))

    def __iter__(self) -> Iterator[Batch]:
        first, every = self.share
        chosen = (i for i in range(len(self)) if i // self.batch % every == first)
        found = (try_read(self, i, self._read) for i in chosen)
        read = readable(found, self.unreadable, all_of_them=every == 1)
        for number, some in groupby(read, key=lambda one: one[0] // self.batch):
            positions, pixels = zip(*some, strict=True)
            images = torch.from_numpy(np.stack(pixels)).to(self.device)
            keys = [self.files[i].name for i in positions]
            yield Batch(images, keys, positions=positions, number=number)

    def _read(self, index: int) -> tuple[int, UInt8[np.ndarray, "3 side side"]]:
        return index, square(self.files[index], self.side, whole=self.whole)


def square(file: Path, side: int, *, whole: bool = False) -> UInt8[np.ndarray, "3 side side"]:
    """Read one image as `Squares` does."""
    image = read_rgb(file, upright=not whole)
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (0, 0, width, height) if whole else (left, top, left + edge, top + edge)
    small = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(small).transpose(2, 0, 1)
