"""Which classes are taken for which: the confusion matrix, as a picture and as a table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont

from zoo.eval.registry import Picture, Scores, Subject

SIDE = 640
"""Of the matrix in the picture, in pixels."""
NAMED = 40
"""Up to so many classes have their names beside the rows and columns."""
LETTERS = 18
PAPER, DARK = np.array([255.0, 255.0, 255.0]), np.array([18.0, 52.0, 140.0])


def confusion(
    truth: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> Int[np.ndarray, "K K"]:
    """Count the images of each class (row) that were taken for each class (column)."""
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def drawn(counts: Int[np.ndarray, "K K"], names: Sequence[str], what: str) -> Picture:
    """Draw a confusion matrix; each row is in shares of its class, and the counts go with it.

    Args:
        names: Of the classes, in the order of the rows.
        what: The benchmark, for the caption.
    """
    total = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    count = len(names)
    cell = max(1, SIDE // count)
    shade = PAPER + (DARK - PAPER) * np.sqrt(shares)[..., None]  # a root, so that 5 % can be seen
    pixels = shade.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    off = shares - np.diag(shares.diagonal())
    a, b = np.unravel_index(off.argmax(), off.shape)
    worst = f"; most often {names[a]} for {names[b]}, {off[a, b]:.0%}" if off[a, b] else ""
    caption = (
        f"{what}: confusion of {count} classes, true ones down, predicted ones across, in shares "
        f"of a row{worst}"
    )
    table = [["true \\ predicted", *names]]
    table += [[name, *map(str, row)] for name, row in zip(names, counts.tolist(), strict=True)]
    return Picture(_labelled(pixels, names, cell), caption, table)


def _labelled(pixels: np.ndarray, names: Sequence[str], cell: int) -> np.ndarray:
    if len(names) > NAMED:
        return pixels
    font = ImageFont.load_default(size=min(14, max(9, cell - 3)))
    short = [n if len(n) <= LETTERS else f"{n[: LETTERS - 1]}…" for n in names]
    edge = round(max(font.getlength(name) for name in short)) + 8
    side = edge + len(pixels)
    sheet = Image.new("RGB", (side, side), "white")
    turned = Image.new("RGB", (edge, len(pixels)), "white")
    draw, along = ImageDraw.Draw(sheet), ImageDraw.Draw(turned)
    for i, name in enumerate(short):
        middle = (i + 0.5) * cell
        draw.text((edge - 4, edge + middle), name, fill="black", font=font, anchor="rm")
        along.text((4, middle), name, fill="black", font=font, anchor="lm")
    sheet.paste(turned.transpose(Image.Transpose.ROTATE_90), (edge, 0))  # read from below upwards
    sheet.paste(Image.fromarray(pixels), (edge, edge))
    return np.asarray(sheet)


def balanced(hits: Scores, truth: Int[np.ndarray, " n"]) -> Scores:
    """Return the mean over classes of their accuracies (balanced accuracy), image by image."""
    member = truth[:, None] == np.unique(truth)
    return Scores(hits.keys, hits.top[:, None] * member, member.astype(float))


def class_names_of(subject: Subject, data: Path, count: int) -> list[str]:
    """Return the names of the classes of labelled images, or of stored features."""
    if subject.read is not None:
        from zoo.eval.stored import about_features

        return list(about_features(data)["classes"])
    return list(subject.open(data, "val").classes) or [str(i) for i in range(count)]
