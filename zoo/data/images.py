"""The one way from an encoded image to pixels, and what counts as unreadable."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from zoo.data.jpeg import plain_size

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"))
"""Endings of the files that are taken for images."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What may be inside of them. Pillow knows more formats, some of which run other programs."""
MOST_SIDE = 2**16 - 1
"""Largest height and width in pixels; Pillow itself refuses more than 179 million pixels."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""
SIDEWAYS = (5, 6, 7, 8)


def printable(name: str) -> str:
    r"""Return a file name with the bytes that are no UTF-8 written as `\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class UnreadableImage(ValueError):
    """An image that cannot be decoded, or whose values have no known range."""


class EncodedImage:
    """An image of which only the header has been read; its pixels are decoded on demand, once.

    Args:
        file: The encoded image, the path of its file, or the open file.
        upright: Turn and mirror it as its EXIF orientation says, as viewers of photographs do.
            Without, pixels stay where they are stored: where boxes, masks and points refer to.
        name: What messages call it; the path by default.

    Raises:
        UnreadableImage: it is none, or has a side above `MOST_SIDE`.
        OSError: the file cannot be read.
    """

    def __init__(self, file: bytes | Path | IO[bytes], *, upright: bool = True, name: str = ""):
        self.name = name or (printable(str(file)) if isinstance(file, Path) else "The image")
        data = file.read_bytes() if isinstance(file, Path) else file
        self._data = data if isinstance(data, bytes) else b""
        with self._named():
            opened = io.BytesIO(data) if isinstance(data, bytes) else data
            self._image = Image.open(opened, formats=FORMATS)
        width, height = self._image.size
        if max(width, height) > MOST_SIDE:
            raise UnreadableImage(
                f"{self.name} has {width} x {height} pixels; no side may have more than "
                f"{MOST_SIDE}."
            )
        # Pillow turns a TIFF by itself; its size is the upright one already
        self._turn = _orientation(self._image) if upright and self._image.format != "TIFF" else 1
        self.size = (height, width) if self._turn in SIDEWAYS else (width, height)
        """Width and height in pixels, upright if so asked."""

    def rgb(self, scale: float = 1.0) -> Image.Image:
        """Decode it as RGB.

        Args:
            scale: A JPEG may be decoded at 1/2, 1/4 or 1/8, if that is not below `scale`.

        Raises:
            UnreadableImage: it is damaged, or as `to_rgb`.
        """
        with self._named():
            width, height = self._image.size
            self._image.draft("RGB", (math.ceil(scale * width), math.ceil(scale * height)))
            image = to_rgb(self._image)
        turn = TURNS.get(self._turn)
        return image if turn is None else image.transpose(turn)

    def pixels(self) -> "Tensor":
        """Decode it as RGB bytes [3 H W], as `rgb` does, but faster where that can be.

        A JPEG that is not to be turned is decoded by simplejpeg where it is installed, in half of
        Pillow's time, else by torchvision in two thirds: all three give the same bytes. What they
        refuse goes through Pillow, which says what is wrong.

        Raises:
            UnreadableImage: as `rgb`.
        """
        import torch

        image = self._image
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and self._turn == 1
        if self._data and plain and (decode := _decode_jpeg()):
            with contextlib.suppress(RuntimeError, ValueError):
                return decode(self._data)
        return torch.from_numpy(np.array(self.rgb())).permute(2, 0, 1)

    def raw(self) -> Image.Image:
        """Decode it in the mode in which it is stored, as masks and depths need.

        Raises:
            UnreadableImage: it is damaged.
        """
        with self._named():
            self._image.load()
        return self._image

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            reason = str(error) if isinstance(error, UnreadableImage) else repr(error)
            if isinstance(error, UnidentifiedImageError):
                reason = f"it is none of {', '.join(FORMATS)}"
            raise UnreadableImage(f"{self.name} cannot be read: {reason}") from error


class PlainJpeg:
    """A JPEG of which Pillow need not be asked (`plain_size`): what opening it costs is saved.

    Its pixels are those of `EncodedImage`, which looks at it where the decoder does not.
    """

    def __init__(self, data: bytes, size: tuple[int, int]):
        self._data, self.size = data, size

    def rgb(self, scale: float = 1.0) -> Image.Image:
        """Decode it as RGB; see `EncodedImage.rgb`."""
        return EncodedImage(self._data).rgb(scale)

    def pixels(self) -> "Tensor":
        """Decode it as RGB bytes [3 H W]; see `EncodedImage.pixels`."""
        if decode := _decode_jpeg():
            with contextlib.suppress(RuntimeError, ValueError):
                return decode(self._data)
        return EncodedImage(self._data).pixels()


def open_image(data: bytes) -> PlainJpeg | EncodedImage:
    """Open an image, upright, in the way that is fastest.

    Raises:
        UnreadableImage: as `EncodedImage`.
    """
    size = plain_size(data)
    return PlainJpeg(data, size) if size else EncodedImage(data)


@cache
def _decode_jpeg() -> "Callable[[bytes], Tensor] | None":
    """Return the fastest decoder that is installed, bytes to [3 H W]; `None` if there is none."""
    return _by_simplejpeg() or _by_torchvision()


def _by_simplejpeg() -> "Callable[[bytes], Tensor] | None":
    """Return a decoder by libjpeg-turbo's own interface, which takes the bytes as they are."""
    import torch

    try:
        from simplejpeg import decode_jpeg  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return lambda data: torch.from_numpy(decode_jpeg(data, "RGB")).permute(2, 0, 1)


def _by_torchvision() -> "Callable[[bytes], Tensor] | None":
    """Return torchvision's decoder.

    The operator itself: the function around it warns, at each image, that it will go in a later
    version, where Pillow takes its place here.
    """
    import torch

    try:
        from torchvision.io import image

        decode: Any = torch.ops.image.decode_jpeg.default
        mode = image.ImageReadMode.RGB.value
    except (ImportError, AttributeError):
        return None
    return lambda data: decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged tags do not damage the pixels
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB bytes; grey of 16 bits keeps its upper 8, as colour does in Pillow.

    Raises:
        UnreadableImage: its values are floats or integers of 32 bits, whose range nobody states.
    """
    of_16_bits = image.mode == "I" and image.format in ("PNG", "PPM", None)
    if of_16_bits or image.mode.startswith("I;16"):
        grey = np.asarray(image).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise UnreadableImage(
            f"it holds {kind}, whose range is not stated; write it with 8 or 16 bits a channel."
        )
    return image.convert("RGB")


def stored_size(file: Path) -> tuple[int, int]:
    """Read the width and height of an image as it is stored; only its header is read.

    Raises:
        UnreadableImage: as `EncodedImage`.
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        return EncodedImage(opened, upright=False, name=printable(str(file))).size


def read_rgb(file: Path, *, upright: bool = True) -> Image.Image:
    """Decode a file as RGB; see `EncodedImage`.

    Raises:
        UnreadableImage: it cannot be decoded; the file is named.
        OSError: it cannot be read.
    """
    return EncodedImage(file, upright=upright).rgb()
