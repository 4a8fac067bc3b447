"""Build a report about many runs and result files: gather, draw, fill the template."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.eval.paired import compare, pair
from zoo.eval.published import published
from zoo.eval.report import figures, svg
from zoo.eval.report.beside import beside
from zoo.eval.report.figures import short_number
from zoo.eval.report.gathered import (
    Measure,
    Model,
    Value,
    gather,
    headline_columns,
    timed_on,
)
from zoo.eval.report.imported import Added
from zoo.eval.report.parts import (
    Cell,
    Gallery,
    MapRow,
    PageImage,
    Row,
    Table,
    compared,
    map_rows,
    template_of,
)
from zoo.eval.results import Record
from zoo.files import written_whole

MOST_PICTURES = 24
MOST_ON_RADAR = 6
MOST_SIZES = 4
"""Sizes of images of which the multiply-adds have a column each."""


SECTIONS = (
    ("headline", "In short", "In short: no headline of a benchmark has been measured."),
    ("radar", "Capabilities", "Capabilities: a radar needs three benchmarks that have a perfect "
     "score and were measured on two models (of one model alone, on that)."),
    ("pareto", "Quality and cost", "Quality and cost: no two models have a quality and a speed, "
     "multiply-adds or parameters at one size."),
    ("differences", "Differences", "Differences: no two models have scores of single images on the "
     "same data."),
    ("same", "Side by side", "Side by side: no benchmark kept predictions for the same images "
     "(segment, depth, detect, classify, knn and linear do, with --out)."),
    ("pictures", "Worst and best", "Worst and best: no benchmark saved an image."),
    ("maps", "Feature maps", "Feature maps: no run saved any."),
    ("numbers", "All numbers", "All numbers: nothing has been measured."),
    ("published", "Published", "Published: no figure is known of these models."),
    ("rerun", "Sources", ""),
)  # fmt: skip
"""The sections of the page: place, name, and what is said at its end of one that would be empty."""


def build_joined(
    sources: Sequence[str | Path], out: str | Path, added: Sequence[Added] = ()
) -> Path:
    """Write a page about many runs and results of `zoo eval`, and return its path.

    The page needs no network and no other file: images are embedded, and also written to
    `<out>_figures`.

    Args:
        sources: Folders of runs, and result files.
        out: The HTML file.
        added: Results of mmdet and mmseg.

    Raises:
        ValueError: a source is neither the folder of a run nor a result file.
        OSError: the page cannot be written; an earlier page then stays complete.
    """
    target = Path(out)
    models, notes = gather(sources, added)
    target.parent.mkdir(parents=True, exist_ok=True)
    gallery = Gallery(target.with_name(f"{target.stem}_figures"))
    shots, more = _shots(models, gallery, notes)
    same = beside(models, gallery, notes)
    parts: dict[str, Any] = dict(
        headline=headline_table(models),
        radar=_radar(models),
        pareto=_pareto(models),
        differences=_differences(models, notes),
        same=same,
        pictures=shots,
        maps=_maps(models, gallery),
        numbers=_tables(models),
        published=_published(models),
    )
    empty = [why for place, _, why in SECTIONS if why and not parts[place]]
    page = template_of("joined.html.j2").render(
        parts,
        title=_title(models),
        contents=[(place, name) for place, name, _ in SECTIONS if parts.get(place, True)],
        legend=[
            (i + 1, m.name, c, svg.ink_on(c))
            for i, (m, c) in enumerate(zip(models, _colours(models), strict=True))
        ],
        on_radar=min(len(models), MOST_ON_RADAR),
        all_models=len(models),
        reference=models[0].name,
        more_pictures=more,
        sources=_sources(models),
        commands=_commands(models),
        notes=notes + empty,
    )
    with written_whole(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _title(models: Sequence[Model]) -> str:
    if len(models) == 1:
        return models[0].name
    first = ", ".join(model.name for model in models[:3])
    return f"{len(models)} models: {first}{', …' if len(models) > 3 else ''}"


# ---------------------------------------------------------------- tables


def headline_table(models: Sequence[Model]) -> Table | None:
    """Return the main number of each benchmark and the cost of each model; `None` without any."""
    columns = headline_columns(models)
    if not columns:
        return None
    cells = [
        compared_values(measure.name, [model.found.get(measure) for model in models])
        for measure, _ in columns
    ]
    head = [" · ".join(text for text in (b.capability, m.data, m.how) if text) for m, b in columns]
    costs = cost_columns(models)
    rows = [
        Row(model.name, [*(column[i] for column in cells), *(cost[i] for _, cost in costs)])
        for i, model in enumerate(models)
    ]
    return Table(["model", *head, *(name for name, _ in costs)], rows)


def compared_values(key: str, values: Sequence[Value | None]) -> list[Cell]:
    """Return cells of means and deviations, of which the best mean is marked."""
    cells = compared(key, [value.mean if value else None for value in values])
    return [
        cell._replace(text=f"{cell.text} ± {_as_fine_as(cell.text, value.deviation)}")
        if value and value.deviation is not None
        else cell
        for cell, value in zip(cells, values, strict=True)
    ]


def _as_fine_as(text: str, deviation: float) -> str:
    """Return a deviation with the decimals of its mean, or a short number if those are zeros."""
    decimals = len(text.partition(".")[2]) if "e" not in text else 0
    fine = f"{deviation:.{decimals}f}"
    return fine if float(fine) or not deviation else short_number(deviation)


def cost_columns(models: Sequence[Model]) -> list[tuple[str, list[Cell]]]:
    """Return what the models cost: parameters, and the multiply-adds at each measured size.

    With many sizes the multiply-adds are one column, in which the size stands beside each.
    """
    parameters = [_scaled(model.about.get("parameters"), 1e6) for model in models]
    columns = [("M parameters", parameters)]
    sizes = sorted({size for model in models for size in {*model.sizes, *model.macs}})
    if len(sizes) > MOST_SIZES:
        cells = [
            Cell("; ".join(f"{short_number(v / 1e9)} at {s} px" for s, v in m.macs.items()) or "–")
            for m in models
        ]
        return [*columns, ("GMACs", cells)]
    for size in sizes:
        cells = [_scaled(model.macs.get(size), 1e9) for model in models]
        columns.append((f"GMACs · {size} px", cells))
    if len(sizes) > 1:
        cells = [Cell(", ".join(map(str, model.sizes)) or "–") for model in models]
        columns.append(("image side, px", cells))
    return columns


def _scaled(value: Any, unit: float) -> Cell:
    known = isinstance(value, int | float) and math.isfinite(value)
    return Cell(short_number(value / unit) if known else "–")


def _tables(models: Sequence[Model]) -> list[tuple[str, Table]]:
    """Return a table for each kind of number and data set: rows are measures, columns models."""
    measures = list(dict.fromkeys(m for model in models for m in model.found))
    groups: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        key = (measure.name.split("/")[0], measure.data, measure.how)
        groups.setdefault(key, []).append(measure)
    found = []
    for (kind, data, how), members in groups.items():
        having = [m for m in models if any(measure in m.found for measure in members)]
        columns = [compared_values(m.name, [one.found.get(m) for one in having]) for m in members]
        name = (f"{kind} on {data}" if data else kind) + (f": {how}" if how else "")
        if len(having) > len(members):  # the longer side becomes the rows
            rows = [Row(one.name, [c[i] for c in columns]) for i, one in enumerate(having)]
            found.append((name, Table(["model", *(m.name for m in members)], rows)))
        else:
            rows = [Row(m.name, column) for m, column in zip(members, columns, strict=True)]
            found.append((name, Table(["measure", *(one.name for one in having)], rows)))
    return found


def _differences(models: Sequence[Model], notes: list[str]) -> Table | None:
    """Compare every other model with the first one."""
    reference, rows = models[0], []
    for model in models[1:]:
        if not reference.records or not model.records:
            continue
        try:
            alone = pair(reference.records, model.records)
            found = compare(reference.records, model.records)
        except ValueError as error:
            notes.append(f"{model.name} against {reference.name}: {error}")
            continue
        notes += [f"Not compared: {x}." for x in alone.left_out(reference.name, model.name)]
        for row in found:
            if row.low is not None:
                cells = [Cell(text, row.separated) for text in row.describe()]
                rows.append(Row(model.name, cells))
    head = ["model", "measure", reference.name, "this model", "difference", "95 % interval"]
    return Table(head, rows) if rows else None


def _published(models: Sequence[Model]) -> Table | None:
    rows, shown = [], set()
    for model in models:
        for name in dict.fromkeys((model.name, str(model.about.get("name")))):
            for figure in published(name, model.sizes[0] if len(model.sizes) == 1 else None):
                key = (name.partition(".")[0], figure.measure, figure.size)
                if key in shown:
                    continue
                shown.add(key)
                side = f"{figure.size} px" if figure.size else "–"
                texts = (figure.measure, f"{figure.value:g} (published)", side, figure.source)
                rows.append(Row(name, [Cell(text) for text in texts]))
    return Table(["model", "measure", "value", "image", "source"], rows) if rows else None


def _sources(models: Sequence[Model]) -> Table | None:
    rows = [Row(model.name, _source_cells(r)) for model in models for r in model.records]
    head = [
        "model",
        "benchmark",
        "data",
        "settings",
        "px",
        "weights",
        "data's hash",
        "precision",
        "batch",
        "left out",
        "seed",
        "date",
        "versions",
        "machine",
    ]
    return Table(head, rows) if rows else None


def _source_cells(record: Record) -> list[Cell]:
    settings = ", ".join(f"{name}={value}" for name, value in record.settings.items())
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    machine = str(record.machine.get("gpu") or record.machine.get("processor") or "–")
    texts = (
        record.benchmark,
        record.data or "–",
        settings or "–",
        str(record.size or "–"),
        record.weights_hash or "–",
        record.data_hash or "–",
        record.precision,
        str(record.batch or "–"),
        f"{record.unreadable} unreadable" if record.unreadable else "–",
        str(record.seed),
        (record.date or "–").replace("T", " "),
        versions or "–",
        machine,
    )
    return [Cell(text) for text in texts]


def _commands(models: Sequence[Model]) -> list[str]:
    lines = [record.command for model in models for record in model.records]
    lines += [model.run.about.get("command") for model in models if model.run]
    return list(dict.fromkeys(str(line) for line in lines if line))


# ---------------------------------------------------------------- pictures


def _colours(models: Sequence[Model]) -> list[str]:
    return svg.colours(len(models))


class Radar(NamedTuple):
    """The drawing, and the share of a perfect score at its rim."""

    svg: str
    rim: float


def _radar(models: Sequence[Model]) -> Radar | None:
    """Draw the share of a perfect score in each headline; of many models the first are shown.

    An axis that one model of several has alone compares nothing and is left out. All axes end at
    the same share: the least quarter that holds all of them.
    """
    least = min(len(models), 2)
    axes = [
        (measure, benchmark)
        for measure, benchmark in headline_columns(models)
        if benchmark.best > 0 and sum(measure in model.values for model in models) >= least
    ]
    if len(axes) < 3:
        return None
    several = len({m.data for m, _ in axes}) > 1
    names = [
        [text for text in (b.capability, m.data if several else "", m.how) if text] for m, b in axes
    ]
    rings = []
    for i, (model, colour) in enumerate(zip(models, _colours(models), strict=True)):
        found = [model.values.get(measure) for measure, _ in axes]
        shares = [
            None if value is None else value / benchmark.best
            for value, (_, benchmark) in zip(found, axes, strict=True)
        ]
        if any(share is not None for share in shares):
            rings.append(svg.Ring(shares, i + 1, model.name, colour, i < MOST_ON_RADAR))
    largest = max((s for ring in rings for s in ring.shares if s is not None), default=1.0)
    rim = next((r for r in (0.25, 0.5, 0.75) if largest <= r), 1.0)
    return Radar(svg.radar(names, rings, rim=rim), rim)


def _pareto(models: Sequence[Model]) -> list[str]:
    """Draw each headline against images per second, multiply-adds and parameters, as SVG.

    Speed and multiply-adds are those at the size at which the quality was measured; where sizes
    differ between the models, each point says its own. Each machine and precision that speeds were
    measured with has a plot of its own.
    """
    plots, paints = [], _colours(models)
    for measure, benchmark in headline_columns(models):
        if benchmark.best <= 0:
            continue
        for label, cost_of, more_is_better in _costs(models):
            found = []
            for i, model in enumerate(models):
                value = model.found.get(measure)
                cost = cost_of(model, value.size) if value else None
                if value and cost and value.mean is not None and math.isfinite(value.mean):
                    found.append((cost, value, i))
            if len(found) < 2:
                continue
            mixed = len({value.size for _, value, _ in found}) > 1
            dots = [
                svg.Dot(
                    cost,
                    float(value.mean or 0.0),
                    value.deviation,
                    i + 1,
                    f"{models[i].name} @{value.size}" if mixed and value.size else models[i].name,
                    paints[i],
                )
                for cost, value, i in found
            ]
            title = " ".join(t for t in (benchmark.capability, measure.data, measure.how) if t)
            plots.append(
                svg.quality(title, label, measure.name, dots, more_is_better=more_is_better)
            )
    return plots


def _unit(value: Any, unit: float) -> float | None:
    return value / unit if isinstance(value, int | float) and value > 0 else None


Cost = tuple[str, Callable[[Model, int | None], float | None], bool]
"""A cost's name, its value for a model at a size in pixels, and whether more of it is better."""


def _costs(models: Sequence[Model]) -> list[Cost]:
    places = timed_on(models)

    def speed(where: str) -> Cost:
        name = f"images/s ({where})" if len(places) > 1 else "images/s"
        return name, lambda model, size: model.rates.get((size or 0, where)), True

    return [
        *map(speed, places),
        ("GMACs per image", lambda model, size: _unit(model.macs.get(size or 0), 1e9), False),
        ("parameters (M)", lambda model, size: _unit(model.about.get("parameters"), 1e6), False),
    ]


class Shot(NamedTuple):
    """An image that a benchmark left, for the section of predictions."""

    picture: PageImage
    caption: str


def _shots(models: Sequence[Model], gallery: Gallery, notes: list[str]) -> tuple[list[Shot], int]:
    """Read the images of all benchmarks, by turns of the models, and count those not shown."""
    from zoo.data.images import UnreadableImage, read_rgb

    queues = [[(model, r, p) for r in model.records for p in r.pictures] for model in models]
    longest = max((len(queue) for queue in queues), default=0)
    turns = [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
    shots = []
    for i, (model, record, picture) in enumerate(turns[:MOST_PICTURES]):
        path = (record.place or Path()) / picture["file"]
        try:
            pixels = np.asarray(read_rgb(path))
        except (UnreadableImage, OSError) as error:
            notes.append(f"The image {path} could not be read: {error}.")
            continue
        words = [model.name, picture["name"], picture.get("caption") or ""]
        caption = ": ".join(word for word in words if word)
        png = figures.tile(pixels, side=720)
        shots.append(Shot(gallery.add(png, f"shot-{i}-{picture['name']}", caption), caption))
    return shots, max(0, len(turns) - MOST_PICTURES)


def _maps(models: Sequence[Model], gallery: Gallery) -> list[tuple[str, list[MapRow]]]:
    found = []
    for i, model in enumerate(models):
        if model.run is not None and model.run.maps:
            own = Gallery(gallery.folder / f"maps-{i}")
            found.append((model.name, map_rows(model.run, own)[:4]))
    return found
