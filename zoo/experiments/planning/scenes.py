"""Scenes from above, drawn by chance: see `zoo.teachers.planning` for what the colours mean."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from zoo.files import written_whole
from zoo.teachers.planning import FASTEST, METRES


def draw_scene(seed: int, number: int, size: int) -> np.ndarray:
    """Draw one scene, [size, size, 3] uint8.

    The road begins under the car and bends once or twice; three to eight things, the size of a
    person to that of a lorry, stand on it or beside it, none where the car is. Noise stays on its
    side of the colours' thresholds: the scene says all that the rules look at.
    """
    draws = np.random.default_rng((seed, number))
    y, x = np.mgrid[0:size, 0:size] + 0.5
    ahead, right = METRES * (1 - y / size), METRES * (x / size - 0.5)
    half = draws.uniform(4.0, 7.0)
    shift, bend, turn = draws.uniform(-1.5, 1.5), draws.uniform(-0.02, 0.02), draws.uniform(-1, 1)
    middle = shift * (ahead / METRES) + bend * ahead**2 + turn * 2 * np.sin(ahead / 10)
    middle -= middle[-1:].mean() - shift * 0.3
    road = np.abs(right - middle) < half
    taken = np.zeros_like(road)
    for _ in range(draws.integers(3, 9)):
        far = draws.uniform(5.0, METRES)
        row = int(size * (1 - far / METRES))
        across = middle[min(row, size - 1), 0] + draws.normal() * half * 0.8
        angle, long = draws.uniform(0, np.pi), draws.uniform(0.6, 3.5)
        wide = min(long, draws.uniform(0.6, 1.6))
        a, b = ahead - far, right - across
        along = np.abs(a * np.cos(angle) + b * np.sin(angle)) < long / 1.5
        taken |= along & (np.abs(b * np.cos(angle) - a * np.sin(angle)) < wide / 1.5)
    taken &= (ahead > 4.0) | (np.abs(right) > 2.5)
    noise = draws.uniform(0, 0.35, (2, size, size))
    red = np.where(taken, 1 - noise[0], noise[0])
    green = np.where(road, 1 - noise[1], noise[1])
    blue = np.full_like(red, draws.uniform(0.2, 1.0) * 8.0 / FASTEST)
    return np.round(255 * np.stack([red, green, blue], axis=-1)).astype(np.uint8)


def write_scenes(path: Path, seed: int, count: int, size: int) -> None:
    """Write scenes as PNGs into a tar shard, whole or not at all; one that is there stays."""
    if path.is_file():
        return
    with written_whole(path) as temporary, tarfile.open(temporary, "w") as tar:
        for number in range(count):
            content = io.BytesIO()
            Image.fromarray(draw_scene(seed, number, size)).save(content, "PNG")
            entry = tarfile.TarInfo(f"{number:06}.png")
            entry.size = content.tell()
            content.seek(0)
            tar.addfile(entry, content)


def scenes(seed: int, count: int, size: int) -> np.ndarray:
    """Return scenes as an array, [count, 3, size, size] float32 in [0, 1]."""
    drawn = np.stack([draw_scene(seed, number, size) for number in range(count)])
    return drawn.transpose(0, 3, 1, 2).astype(np.float32) / 255
