"""One picture for a README or a paper: a run's maps, or models by speed and accuracy."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zoo.eval.report import plots, svg
from zoo.eval.report.figures import FAINT, INK, shorten
from zoo.eval.report.gathered import gather, headline_columns, timed_on
from zoo.eval.report.maps import colour
from zoo.eval.report.run_folder import RunFolder, read_run
from zoo.eval.results import SUFFIX
from zoo.files import written_whole

WIDTH = 1000
"""Of the picture, in pixels."""
MOST_BYTES = 300_000
MOST_ROWS = 4
GAP, HEAD = 6, 44


def write_picture(sources: Sequence[str | Path], out: Path) -> Path:
    """Write a PNG under 300 kB about a run's feature maps, or about the speed of many models.

    Of one run's folder it has the images of `maps.npz`, each with a teacher's map and that of the
    student's head for it, side by side. Of anything else it has the first headline that was
    measured together with a speed.

    Raises:
        ValueError: there are no maps, or no model has both numbers.
    """
    one = Path(sources[0])
    if len(sources) == 1 and one.suffix != SUFFIX and one.is_dir():
        png = maps_picture(read_run(one))
    else:
        png = speed_picture(sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as temporary:
        temporary.write_bytes(png)
    return out


def maps_picture(run: RunFolder) -> bytes:
    """Draw images, teachers' maps and the student's beside each other, as a PNG.

    Raises:
        ValueError: the run saved no maps, or a teacher has none.
    """
    images = run.maps.get("images", np.empty(0))[:MOST_ROWS]
    pairs = {
        name: colour(run.maps[f"theirs/{name}"], run.maps[f"ours/{name}"])
        for name in run.teachers
        if f"theirs/{name}" in run.maps and f"ours/{name}" in run.maps
    }
    if not len(images) or not pairs:
        raise ValueError(f"{run.path} has no feature maps to draw (maps.npz, of zoo distill).")
    heads = [("photograph", "")]
    columns: list[np.ndarray] = [images]
    for name, sides in pairs.items():
        for who, side in zip(("teacher", "student"), sides, strict=True):
            heads.append((shorten(name, 26), who))
            columns.append(side)
    width = WIDTH
    while True:
        png = _sheet(heads, columns, width)
        if len(png) <= MOST_BYTES or width < 400:
            return png
        width = round(0.85 * width)


def _sheet(heads: Sequence[tuple[str, str]], columns: Sequence[np.ndarray], width: int) -> bytes:
    """Put columns of images [n H W 3] on a white sheet, with two lines of words above each."""
    side = (width - GAP * (len(columns) - 1)) // len(columns)
    rows = len(columns[0])
    sheet = Image.new("RGB", (width, HEAD + rows * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for i, ((first, second), column) in enumerate(zip(heads, columns, strict=True)):
        left = i * (side + GAP)
        for line, (words, ink) in enumerate(((second or first, INK), (first, FAINT))):
            if line == 0 or second:
                draw.text((left, 4 + 18 * line), _fit(words, font, side), fill=ink, font=font)
        photo = i == 0
        how = Image.Resampling.LANCZOS if photo else Image.Resampling.NEAREST
        for row, pixels in enumerate(column[:rows]):
            tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), how)
            sheet.paste(tile, (left, HEAD + row * (side + GAP)))
    out = io.BytesIO()
    sheet.save(out, format="PNG", optimize=True)
    return out.getvalue()


def _fit(words: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, room: int) -> str:
    """Shorten a text in its middle until it fits."""
    most = len(words)
    while font.getlength(shorten(words, most)) > room and most > 5:
        most -= 1
    return shorten(words, most)


def speed_picture(sources: Sequence[str | Path]) -> bytes:
    """Draw the first headline that models have together with images a second, as a PNG.

    Speeds are those of the machine and precision that most models were timed with.

    Raises:
        ValueError: no model has both at one size.
    """
    models, _ = gather(sources)
    paints = svg.colours(len(models))
    where = next(iter(timed_on(models)), "")
    for measure, benchmark in headline_columns(models):
        points: list[plots.Point] = []
        for model, paint in zip(models, paints, strict=True):
            value = model.found.get(measure)
            rate = model.rates.get((value.size or 0, where)) if value else None
            if value and value.mean is not None and rate:
                points.append((rate, value.mean, model.name, paint))
        if points:
            title = " · ".join(text for text in (benchmark.capability, measure.data) if text)
            return plots.quality(
                title, "images per second", measure.name, points, more_is_better=True
            )
    raise ValueError(
        "No model has a headline and a speed at one image size; measure both: "
        "zoo eval MODEL --on knn,speed --data PATH --out results.jsonl"
    )
