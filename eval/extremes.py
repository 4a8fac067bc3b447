"""The pictures of a benchmark: the images with the worst and the best scores, by a stated rule."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from zoo.eval.registry import Found, Picture

LINE, MARGIN, SWATCH = 22, 8, 14
"""Of the legend, in pixels."""


class Extremes:
    """Keeps the pictures of the worst images, and of the best, while images go by.

    Half of them are the worst, and one more where the number is odd; of equal scores the first.

    Args:
        count: Pictures that are kept at most.
        rule: What the score is, for the captions: "accuracy of pixels".
        unit: Behind the score in the captions.
    """

    def __init__(self, count: int, rule: str, unit: str = " %"):
        self.rule, self.unit, self.seen = rule, unit, 0
        self.most = {"worst": count - count // 2, "best": count // 2}
        self.kept: dict[str, list[tuple[float, int, str, Picture]]] = {"worst": [], "best": []}

    def offer(self, score: float, name: str, draw: Callable[[], Picture]) -> None:
        """Draw an image and keep it, if it is among the worst or the best so far.

        Args:
            score: Higher is better; an image whose score is NaN is passed over.
        """
        number, self.seen = self.seen, self.seen + 1
        if np.isnan(score):
            return
        picture: Picture | None = None
        for side, sign in (("worst", 1), ("best", -1)):
            kept, most = self.kept[side], self.most[side]
            if most and (len(kept) < most or sign * score < sign * kept[-1][0]):
                picture = picture or draw()
                kept.append((score, number, name, picture))
                kept.sort(key=lambda one: (sign * one[0], one[1]))
                del kept[most:]

    def found(self) -> Iterator[Found]:
        """Yield the pictures, the worst first; one that is both stands among the worst."""
        shown: set[int] = set()
        for side in ("worst", "best"):
            for place, (score, number, name, picture) in enumerate(self.kept[side], 1):
                if number in shown:
                    continue
                shown.add(number)
                rank = f"{side} {place} of {self.seen} by {self.rule} ({score:.1f}{self.unit})"
                yield name, picture._replace(caption=f"{picture.caption}; {rank}")


def with_legend(
    pixels: UInt8[np.ndarray, "H W 3"], entries: Sequence[tuple[str, Sequence[int]]]
) -> UInt8[np.ndarray, "G W 3"]:
    """Put names beside squares of their colours below an image, in as many lines as they need."""
    if not entries:
        return pixels
    width, font = pixels.shape[1], ImageFont.load_default(size=13)
    places, left, line = [], MARGIN, 0
    for name, _ in entries:
        room = SWATCH + 5 + round(font.getlength(name)) + 2 * MARGIN
        if left + room > width and left > MARGIN:
            left, line = MARGIN, line + 1
        places.append((left, line))
        left += room
    strip = Image.new("RGB", (width, MARGIN + LINE * (line + 1)), "white")
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, row) in zip(entries, places, strict=True):
        y = MARGIN // 2 + LINE * row
        draw.rectangle((x, y + 3, x + SWATCH, y + 3 + SWATCH), fill=tuple(map(int, colour)))
        draw.text((x + SWATCH + 5, y + 2), name, fill="black", font=font)
    return np.concatenate([pixels, np.asarray(strip)])
