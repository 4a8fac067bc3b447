"""Image files as batches of squares, for benchmarks with their own lists of images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from zoo.data.images import read_rgb
from zoo.features import Batch


def squares(
    files: Sequence[Path], side: int, batch: int, device: torch.device, *, whole: bool = False
) -> Iterator[Batch]:
    """Yield the images in order as squares of `side` pixels, with the file names as keys.

    Args:
        whole: Resize the whole image, as it is stored, to a square: points in it are shares of its
            sides. Otherwise its largest centred square is taken, upright.

    Raises:
        UnreadableImage: a file cannot be decoded.
    """
    for first in range(0, len(files), batch):
        some = files[first : first + batch]
        pixels = np.stack([square(file, side, whole=whole) for file in some])
        yield Batch(torch.from_numpy(pixels).to(device), [file.name for file in some])


def square(file: Path, side: int, *, whole: bool = False) -> UInt8[np.ndarray, "3 side side"]:
    """Read one image as `squares` does."""
    image = read_rgb(file, upright=not whole)
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (0, 0, width, height) if whole else (left, top, left + edge, top + edge)
    small = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(small).transpose(2, 0, 1)
