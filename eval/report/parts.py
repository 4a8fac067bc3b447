"""What pages are made of: embedded images, tables with their best cells, and feature maps."""

import base64
import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.eval.report import figures
from zoo.eval.report.figures import short_number
from zoo.eval.report.maps import colour
from zoo.eval.report.run_folder import RunFolder

MOST_IMAGES = 8
LESS_IS_BETTER = re.compile(
    r"^mse/|^prune/|/(?:rmse|abs_?rel|error|loss|\w*perplexity|bpb|gmacs|mparams|peak_gib)$"
)


def template_of(name: str) -> Any:
    """Load a Jinja template of this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


class PageImage(NamedTuple):
    """An image for embedding in a page."""

    src: str
    alt: str
    width: int
    height: int


class Gallery:
    """Writes images to a folder beside the page, and returns them for embedding."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def add(self, png: bytes, name: str, alt: str) -> PageImage:
        """Write a PNG as `name`.png, with other characters than letters and digits replaced."""
        width, height = struct.unpack(">II", png[16:24])  # the PNG's header says its size
        return self._add(png, "png", "png", name, PageImage("", alt, width, height))

    def add_photo(self, jpeg: bytes, size: tuple[int, int], name: str, alt: str) -> PageImage:
        """Write a JPEG of width and height `size` as `name`.jpg, likewise."""
        return self._add(jpeg, "jpeg", "jpg", name, PageImage("", alt, *size))

    def _add(self, data: bytes, kind: str, suffix: str, name: str, image: PageImage) -> PageImage:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]
        (self.folder / f"{slug}.{suffix}").write_bytes(data)
        encoded = base64.b64encode(data).decode()
        return image._replace(src=f"data:image/{kind};base64,{encoded}")


class Cell(NamedTuple):
    """A cell of a table; `best` ones are bold."""

    text: str
    best: bool = False


class Row(NamedTuple):
    """A row of a table; the name of a `strong` one is bold."""

    name: str
    cells: list[Cell]
    strong: bool = False


class Table(NamedTuple):
    """The texts of a table."""

    head: list[str]
    rows: list[Row]


def measure_text(key: str, value: float | None) -> str:
    """Return percentages with one decimal, other numbers with three significant digits."""
    if value is not None and key.endswith("top1") and math.isfinite(value):
        return f"{value:.1f}"
    return short_number(value)


def compared(key: str, values: Sequence[float | None]) -> list[Cell]:
    """Return cells of which the best is marked: the lowest error or cost, the highest otherwise."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    best = (min if LESS_IS_BETTER.search(key) else max)(known, default=None)
    return [Cell(measure_text(key, v), len(known) > 1 and v == best) for v in values]


def course(what: str, values: Sequence[float]) -> str:
    """Return a sentence on the first and the last of logged values, for who cannot see a plot."""
    return f"{what} from {short_number(values[0])} to {short_number(values[-1])}"


class MapPair(NamedTuple):
    """A teacher's map of an image, and that of the student's head for it."""

    teacher: str
    theirs: PageImage
    ours: PageImage


class MapRow(NamedTuple):
    """An image with its maps."""

    key: str
    image: PageImage
    pairs: list[MapPair]


def map_rows(run: RunFolder, gallery: Gallery) -> list[MapRow]:
    """Colour the maps that a run saved: a row for each image, a pair of maps for each teacher."""
    images = run.maps.get("images", ())[:MOST_IMAGES]
    coloured = {}
    for teacher in run.teachers:
        theirs, ours = (run.maps.get(f"{who}/{teacher}") for who in ("theirs", "ours"))
        if theirs is not None and ours is not None:
            coloured[teacher] = colour(theirs, ours)
    keys = [str(key) for key in run.maps.get("keys", ())]
    rows = []
    for i, pixels in enumerate(images):
        key = keys[i] if i < len(keys) else f"image {i + 1}"
        image = gallery.add(figures.tile(pixels), f"maps-{i}-image", f"input image {key}")
        pairs = []
        for j, (teacher, sides) in enumerate(coloured.items()):
            named = zip(("teacher", "student"), sides, strict=True)
            theirs, ours = (
                gallery.add(
                    figures.tile(side[i]), f"maps-{i}-{j}-{who}", f"{who}'s map, {teacher}, {key}"
                )
                for who, side in named
            )
            pairs.append(MapPair(teacher, theirs, ours))
        rows.append(MapRow(key, image, pairs))
    return rows
