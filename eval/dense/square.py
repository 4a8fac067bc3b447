"""Image files as batches of squares, for benchmarks with their own lists of images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from zoo.features import Batch


def squares(
    files: Sequence[Path], side: int, batch: int, device: torch.device, *, whole: bool = False
) -> Iterator[Batch]:
    """Yield the images in order as squares of `side` pixels, with the file names as keys.

    Args:
        whole: Resize the whole image to a square, instead of its largest centred square.

    Raises:
        ValueError: a file cannot be read.
    """
    for first in range(0, len(files), batch):
        some = files[first : first + batch]
        pixels = np.stack([square(file, side, whole=whole) for file in some])
        yield Batch(torch.from_numpy(pixels).to(device), [file.name for file in some])


def square(file: Path, side: int, *, whole: bool = False) -> UInt8[np.ndarray, "3 side side"]:
    """Read one image as `squares` does."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise ValueError(f"The image {file} cannot be read: {error}.") from error
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (0, 0, width, height) if whole else (left, top, left + edge, top + edge)
    small = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(small).transpose(2, 0, 1)
