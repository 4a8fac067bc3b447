"""Feature maps of a few images: collect, save, and colour them for comparison."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from zoo.features import Batch, Features
from zoo.files import read_arrays, written_whole

LARGEST = 6e4
"""Just below the largest float16; larger values of a diverged student are clipped to it."""

TOKENS_TO_FIT = 1024
"""Tokens from which the components are computed; more would only be slower."""

PLAIN = np.float32(1e-12)
"""With a smaller spread of values a map is drawn in one colour."""


@torch.inference_mode()
def collect_maps(
    student: Callable[[Batch], Mapping[str, Features]],
    teachers: Mapping[str, Callable[[Batch], Features]],
    batch: Batch,
) -> dict[str, np.ndarray]:
    """Return the maps of a few images: those of every teacher, and of the student's head for it.

    The keys are `images` (uint8 [B H W 3]), `keys`, and for every teacher that has a map
    `theirs/<name>` and `ours/<name>` (float16 [B h w C], each on its own grid). Both are shifted
    by the teacher's channel means and divided by its global deviation, since float16 is too coarse
    for features that are small beside their mean. This does not change the colours.

    Args:
        student: Returns features in the teachers' original space: fold the normalisers into the
            heads first.
        batch: A few images, all of which are stored.
    """
    maps = {"images": _as_bytes(batch.images), "keys": np.array([str(key) for key in batch.keys])}
    ours = student(batch)
    for name, teacher in teachers.items():
        target, guess = teacher(batch).spatial, ours[name].spatial
        if target is None or guess is None:
            continue
        mean = target.double().mean(dim=(0, 1, 2))
        scale = (target.double() - mean).square().mean().sqrt().clamp(min=1e-30)
        maps[f"theirs/{name}"] = _as_half((target.double() - mean) / scale)
        maps[f"ours/{name}"] = _as_half((guess.double() - mean) / scale)
    return maps


def _as_bytes(images: Tensor) -> UInt8[np.ndarray, "B H W 3"]:
    if images.is_floating_point():
        images = (images.float() * 255).round().clamp(0, 255).byte()
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _as_half(x: Tensor) -> np.ndarray:
    return x.nan_to_num(0.0).clamp(-LARGEST, LARGEST).half().cpu().numpy()


def save_maps(maps: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write the maps of `collect_maps` to one `.npz`, completely or not at all."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **dict(maps))  # pyright: ignore[reportArgumentType]


def load_maps(path: str | Path) -> dict[str, np.ndarray]:
    """Read the maps that `save_maps` wrote, without executing code in the file.

    Raises:
        ValueError: the file is missing, damaged, or holds no maps.
    """
    try:
        maps = read_arrays(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable file of feature maps: {error}") from None
    images = maps.get("images", np.empty(0))
    if images.ndim != 4:
        raise ValueError(f"{path} holds no images; it was not written by save_maps.")
    for key, value in maps.items():
        partner = maps.get(key.replace("theirs/", "ours/", 1), value)
        if key == "keys":
            continue
        if value.ndim != 4 or len(value) != len(images) or value.dtype.kind not in "fu":
            raise ValueError(f"{path}: {key} has the shape {value.shape}, which does not fit.")
        if partner.shape[-1:] != value.shape[-1:]:
            raise ValueError(f"{path}: {key} has another width than the student's head for it.")
    return maps


def colour(
    theirs: Float[np.ndarray, "B h w C"], ours: Float[np.ndarray, "B m n C"]
) -> tuple[UInt8[np.ndarray, "B h w 3"], UInt8[np.ndarray, "B m n 3"]]:
    """Turn a teacher's maps and a student's into RGB by the same colours.

    Red, green and blue are the first three principal components of the teacher's tokens in these
    images, from their 2nd to their 98th percentile. The student is projected on the same
    components and clipped at the same limits, so a colour has the same meaning on both sides, and a
    student that always predicts the mean has one colour.

    Raises:
        ValueError: the two do not have the same number of channels.
    """
    if theirs.shape[-1] != ours.shape[-1]:
        raise ValueError(
            f"The teacher's maps have {theirs.shape[-1]} channels and the student's have "
            f"{ours.shape[-1]}; only maps in one space can be compared."
        )
    tokens = theirs.reshape(-1, theirs.shape[-1]).astype(np.float32)
    mean, axes = _principal_axes(tokens)
    shown = (tokens - mean) @ axes
    low, high = np.percentile(shown, (2, 98), axis=0)
    plain = high - low < PLAIN
    width = np.where(plain, 1, high - low)

    def rgb(x: np.ndarray) -> np.ndarray:
        level = ((x.astype(np.float32) - mean) @ axes - low) / width
        return (np.where(plain, 0.5, np.clip(level, 0, 1)) * 255).round().astype(np.uint8)

    return rgb(theirs), rgb(ours)


def _principal_axes(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and three axes [C 3]; axes that the tokens do not have are zero."""
    mean = tokens.mean(axis=0)
    order = np.random.default_rng(0).permutation(len(tokens))[:TOKENS_TO_FIT]
    _, _, found = np.linalg.svd(tokens[order] - mean, full_matrices=False)
    axes = np.zeros((3, tokens.shape[1]), np.float32)
    axes[: len(found[:3])] = found[:3]
    # The sign of an axis is arbitrary: make its largest entry positive, so that colours are stable.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return mean, (axes * np.where(largest < 0, -1, 1)).T
