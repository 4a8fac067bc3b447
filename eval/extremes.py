"""The pictures of a benchmark: the images with the worst and the best scores, by a stated rule."""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from zoo.eval.registry import Found, Picture

LINE, MARGIN, SWATCH = 22, 8, 14
"""Of the legend, in pixels."""


class Extremes:
    """Keeps the pictures of the worst images, and of the best, while images go by.

    Half of them are the worst, and one more where the number is odd. Of equal scores the first
    images count as worse.

    Args:
        count: Pictures that are kept at most.
        rule: What the score is, for the captions: "accuracy of pixels".
    """

    def __init__(self, count: int, rule: str):
        self.rule, self.seen = rule, 0
        self.most = {"worst": count - count // 2, "best": count // 2}
        self.kept: dict[str, list[tuple[float, int, str, Callable[[], Picture]]]] = {
            side: [] for side in self.most
        }

    def offer(self, score: float, name: str, draw: Callable[[], Picture]) -> None:
        """Keep an image, if it is among the worst or the best so far.

        Args:
            score: From 0, higher is better; an image whose score is NaN is passed over.
            draw: Called at the end, if the image is still kept.
        """
        number, self.seen = self.seen, self.seen + 1
        if np.isnan(score):
            return
        for side, sign in (("worst", 1), ("best", -1)):
            kept = self.kept[side]
            kept.append((sign * score, sign * number, name, draw))
            kept.sort(key=itemgetter(0, 1))
            del kept[self.most[side] :]

    def found(self) -> Iterator[Found]:
        """Yield the pictures, the worst first; one that is both stands among the worst."""
        shown: set[int] = set()
        for side, kept in self.kept.items():
            for place, (score, number, name, draw) in enumerate(kept, 1):
                if abs(number) in shown:
                    continue
                shown.add(abs(number))
                value = f"{abs(score):.1f} %"
                rank = f"{side} {place} of {self.seen} by {self.rule} ({value})"
                picture = draw()
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
