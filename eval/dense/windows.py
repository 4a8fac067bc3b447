"""Large images through a network that looks at squares, and a student made for such squares."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.features import Batch
from zoo.students.student import Student


def starts(length: int, side: int, stride: int) -> list[int]:
    """Return where the windows along one edge begin; the last one ends with the image."""
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
    """Average the answers to overlapping square windows of one image, and give them at its size.

    The image's short side is brought to `side` first.

    Args:
        answer: Gives a value for each pixel of a window.
        stride: Pixels from one window to the next.
        batch: Windows that are looked at together.
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


def at_size(student: Student, side: int, option: str) -> Student:
    """Return a student for squares of `side` pixels; the given one stays as it is.

    Args:
        option: What the user sets `side` by, for the error.

    Raises:
        ValueError: its backbone cannot look at such images.
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
            f"{student.recipe[0]} cannot look at {side} px: {reason}. Choose another {option}."
        ) from error
    if features.spatial is None:
        raise ValueError(f"{student.recipe[0]} gives no map, which dense tasks need.")
    return wide


def _check_patches(student: Student, side: int, option: str) -> None:
    """Refuse a size that the patches do not tile: timm would cut off the rest, and say nothing."""
    patch = getattr(getattr(student.backbone, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    if side % patch:
        below = side // patch * patch
        near = " or ".join(str(s) for s in (below, below + patch) if s)
        raise ValueError(
            f"{student.recipe[0]} cannot look at {side} px: its patches of {patch} px do not tile "
            f"them. Choose {option} {near}."
        )
