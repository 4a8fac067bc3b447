"""Corruptions of images after ImageNet-C (1903.12261), of which no kept library installs today.

Six of its fifteen, with five severities; each takes the cropped image, as there.
"""

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

NAMES = ("gaussian_noise", "shot_noise", "brightness", "contrast", "pixelate", "jpeg")
SEVERITIES = 5


def _bytes(x: np.ndarray) -> np.ndarray:
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def _gaussian(x: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity]
    return _bytes(x / 255 + draws.normal(scale=deviation, size=x.shape))


def _shot(x: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    photons = (60, 25, 12, 5, 3)[severity]
    return _bytes(draws.poisson(x / 255 * photons) / photons)


def _brightness(x: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    """Raise the value of HSV, which is the largest of red, green and blue."""
    more = (0.1, 0.2, 0.3, 0.4, 0.5)[severity]
    value = x.max(axis=2, keepdims=True) / 255
    scale = np.where(value > 0, (value + more).clip(0, 1) / np.maximum(value, 1e-9), 0)
    return _bytes(np.where(value > 0, x / 255 * scale, more))


def _contrast(x: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    share = (0.4, 0.3, 0.2, 0.1, 0.05)[severity]
    mean = (x / 255).mean(axis=(0, 1), keepdims=True)
    return _bytes((x / 255 - mean) * share + mean)


def _pixelate(x: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity]
    rows, cols = x.shape[:2]
    small = Image.fromarray(x).resize(
        (max(1, int(cols * share)), max(1, int(rows * share))), Image.Resampling.BOX
    )
    return np.asarray(small.resize((cols, rows), Image.Resampling.BOX))


def _jpeg(x: np.ndarray, severity: int, draws: np.random.Generator) -> np.ndarray:
    quality, file = (25, 18, 15, 10, 7)[severity], io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


KINDS: Mapping[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = dict(
    zip(NAMES, (_gaussian, _shot, _brightness, _contrast, _pixelate, _jpeg), strict=True)
)


def corrupt(image: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """Return a corrupted image.

    Args:
        severity: 1 to 5.
        seed: Of the noise; give each image its own.

    Raises:
        ValueError: there is no such corruption or severity.
    """
    if name not in KINDS or not 1 <= severity <= SEVERITIES:
        raise ValueError(
            f"There is no corruption {name!r} of severity {severity}; there are "
            f"{', '.join(NAMES)}, of severities 1 to {SEVERITIES}."
        )
    draws = np.random.default_rng([seed, severity, NAMES.index(name)])
    pixels = np.asarray(image.convert("RGB"))
    return Image.fromarray(KINDS[name](pixels, severity - 1, draws))
