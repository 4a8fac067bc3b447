"""Pictures that are drawn on the spot, each with a question whose answer is known exactly.

    text      two characters are written         "what is written?"                    "K7"
    count     one to five discs and squares      "how many circles are there?"         "3"
    color     three shapes of three colours      "what color is the circle?"           "red"
    position  a circle and a square              "where is the circle: left, right,    "left"
                                                  above or below the square?"

A picture follows from its number and the part alone (train or val), so nothing is stored and no
network is needed. The question alone is worth a guess: 1 in 484 for text, in 5 for a count, in 6
for a colour and in 4 for a position.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.data.plan import mix

GENERATED = "generated"
SIDE = 64
KINDS = ("text", "count", "color", "position")
CHARACTERS = "ACEFHJKLPTUXY234567890"
COLORS = dict(
    red=(205, 45, 45), green=(40, 150, 60), blue=(50, 80, 210), yellow=(225, 200, 40),
    black=(15, 15, 15), white=(250, 250, 250),
)  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIDES = dict(left=(-1, 0), right=(1, 0), above=(0, -1), below=(0, 1))


class Drawn(NamedTuple):
    """A picture and what is asked about it."""

    image: Image.Image
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Generated:
    """So many pictures of one part, in turn of each kind."""

    count: int
    part: int = 0

    def __len__(self) -> int:
        return self.count

    def drawn(self, index: int) -> Drawn:
        """Draw a picture."""
        draws = self._draws(index)
        grey = int(draws.integers(110, 190))
        image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
        kind = KINDS[index % len(KINDS)]
        question, answer = DRAWING[kind](ImageDraw.Draw(image), draws)
        return Drawn(image, question, answer, kind)

    def asked(self, index: int) -> tuple[str, str, str]:
        """Return question, answer and kind, without the picture."""
        draws = self._draws(index)
        draws.integers(110, 190)  # its grey
        kind = KINDS[index % len(KINDS)]
        return *DRAWING[kind](Nowhere(), draws), kind

    def _draws(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=mix(31, self.part, index)))

    def read(self, index: int) -> Image.Image:
        return self.drawn(index).image

    def size(self, index: int) -> tuple[int, int]:
        return SIDE, SIDE


class Nowhere:
    """A canvas that keeps nothing, where the question alone is wanted."""

    def _nothing(self, *_: Any) -> None:
        pass

    ellipse = rectangle = polygon = text = _nothing


Canvas = ImageDraw.ImageDraw | Nowhere


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _shape(canvas: Canvas, shape: str, x: int, y: int, radius: int, color: str) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, COLORS[color])
    elif shape == "square":
        canvas.rectangle(box, COLORS[color])
    else:
        canvas.polygon(
            [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], COLORS[color]
        )


def _colors(draws: np.random.Generator, number: int) -> list[str]:
    return [str(name) for name in draws.choice(list(COLORS), number, replace=False)]


def _cells(draws: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """Draw places in a grid of 3 x 3, none of them twice, each moved by a few pixels."""
    chosen = draws.choice(9, number, replace=False)
    jitter = draws.integers(-2, 3, (number, 2))
    return [
        (11 + 21 * int(c % 3) + int(dx), 11 + 21 * int(c // 3) + int(dy))
        for c, (dx, dy) in zip(chosen, jitter, strict=True)
    ]


def _text(canvas: Canvas, draws: np.random.Generator) -> tuple[str, str]:
    word = "".join(str(c) for c in draws.choice(list(CHARACTERS), 2))
    font = _font(int(draws.integers(22, 31)))
    x, y = int(draws.integers(4, 18)), int(draws.integers(4, 28))
    canvas.text((x, y), word, COLORS[str(draws.choice(["black", "white", "blue", "red"]))], font)
    return "what is written?", word


def _count(canvas: Canvas, draws: np.random.Generator) -> tuple[str, str]:
    number, others = int(draws.integers(1, 6)), int(draws.integers(0, 4))
    for place, (x, y) in enumerate(_cells(draws, number + others)):
        shape = "circle" if place < number else "square"
        _shape(canvas, shape, x, y, int(draws.integers(6, 10)), _colors(draws, 1)[0])
    return "how many circles are there?", str(number)


def _color(canvas: Canvas, draws: np.random.Generator) -> tuple[str, str]:
    shapes = [str(name) for name in draws.permutation(SHAPES)]
    colors = _colors(draws, len(shapes))
    for shape, color, (x, y) in zip(shapes, colors, _cells(draws, len(shapes)), strict=True):
        _shape(canvas, shape, x, y, int(draws.integers(6, 10)), color)
    return f"what color is the {shapes[0]}?", colors[0]


def _position(canvas: Canvas, draws: np.random.Generator) -> tuple[str, str]:
    side = str(draws.choice(list(SIDES)))
    dx, dy = SIDES[side]
    away, aside = int(draws.integers(11, 18)), int(draws.integers(-6, 7))
    middle_x, middle_y = (int(v) for v in draws.integers(28, 37, 2))
    x, y = dx * away + (aside if dy else 0), dy * away + (aside if dx else 0)
    colors = _colors(draws, 2)
    _shape(canvas, "circle", middle_x + x, middle_y + y, 8, colors[0])
    _shape(canvas, "square", middle_x - x, middle_y - y, 8, colors[1])
    return "where is the circle: left, right, above or below the square?", side


DRAWING = dict(text=_text, count=_count, color=_color, position=_position)
