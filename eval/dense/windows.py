"""Run a network that takes squares over larger images, and fit a student to such squares."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.eval.registry import Subject
from zoo.eval.settings import DepthSettings, SegmentSettings
from zoo.features import Batch
from zoo.students.student import Student


def starts(length: int, side: int, stride: int) -> list[int]:
    """Return the starts of the windows along one edge; the last window ends with the image."""
    last = max(length - side, 0)
    return [*range(0, last, stride), last]


def sliding(
    answer: Callable[[Batch], Float[Tensor, "n K side side"]],
    image: Float[Tensor, "1 3 H W"],
    *,
    side: int,
    stride: int,
    batch: int = 16,
) -> Float[Tensor, "1 K H W"]:
    """Average the outputs for overlapping square windows of one image; return them at its size.

    The image's short side is first resized to `side`.

    Args:
        answer: Returns K values for each pixel of the windows.
        side: Side of a window, in pixels.
        stride: Pixels from one window to the next.
        batch: Windows that are processed at once.
    """
    height, width = image.shape[-2:]
    zoom = side / min(height, width)
    rows, cols = max(side, round(height * zoom)), max(side, round(width * zoom))
    fitted = Batch(image).at((rows, cols))
    corners = [(y, x) for y in starts(rows, side, stride) for x in starts(cols, side, stride)]
    windows = torch.cat([fitted[..., y : y + side, x : x + side] for y, x in corners])
    outputs = torch.cat([answer(Batch(some)).float() for some in windows.split(batch)])
    total = outputs.new_zeros(1, outputs.shape[1], rows, cols)
    count = outputs.new_zeros(1, 1, rows, cols)
    for part, (y, x) in zip(outputs, corners, strict=True):
        total[..., y : y + side, x : x + side] += part
        count[..., y : y + side, x : x + side] += 1
    return F.interpolate(total / count, (height, width), mode="bilinear")


W = TypeVar("W", SegmentSettings, DepthSettings)


def stride_of(settings: SegmentSettings | DepthSettings) -> int:
    """Return the pixels from one window to the next: by default two thirds of a window."""
    return settings.stride or max(1, settings.crop * 2 // 3)


def with_stride(subject: Subject, settings: W) -> W:
    """Return the settings with the stride that is used.

    Raises:
        ValueError: the backbone cannot process windows of that size.
    """
    at_size(subject.student, settings.crop, f"--{NAMES[type(settings)]}.crop")
    return replace(settings, stride=stride_of(settings))


NAMES: dict[type, str] = {SegmentSettings: "segment", DepthSettings: "depth"}


def at_size(student: Student, side: int, option: str) -> Student:
    """Return the student for squares of `side` pixels: a copy, unless it already has that size.

    Args:
        option: The command line's option for `side`, for the message.

    Raises:
        ValueError: the backbone cannot process such images, or has no spatial map.
    """
    size = (side, side)
    _check_patches(student, side, option)
    wide = student if student.size == size else copy.deepcopy(student).eval()
    try:
        if wide is not student and hasattr(wide.backbone, "set_input_size"):
            wide.backbone.set_input_size(img_size=size)  # pyright: ignore[reportCallIssue]
        wide.size = size
        with torch.no_grad():
            black = Batch(torch.zeros(1, 3, *size, device=student.mean.device))
            features = wide.features(black)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{student.recipe[0]} cannot process {side} px: {reason}. Choose another {option}."
        ) from error
    if features.spatial is None:
        raise ValueError(f"{student.recipe[0]} has no spatial map, which dense tasks need.")
    return wide


def _check_patches(student: Student, side: int, option: str) -> None:
    """Refuse a size that patches do not tile: timm would silently cut off the rest."""
    patch = getattr(getattr(student.backbone, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    if side % patch:
        below = side // patch * patch
        near = " or ".join(str(s) for s in (below, below + patch) if s)
        raise ValueError(
            f"{student.recipe[0]} cannot process {side} px: its patches of {patch} px do not tile "
            f"them. Choose {option} {near}."
        )
