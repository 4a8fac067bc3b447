"""The report of a pruned model: what stayed, what it scored, what it cost, how it recovered."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.axes import numbered
from zoo.eval.report import figures, plots
from zoo.eval.report.figures import short_number
from zoo.eval.report.parts import Cell, Gallery, PageImage, Row, Table, template_of
from zoo.eval.report.run_folder import UNTRAINED, number, read_lines, series
from zoo.files import checked, read_json, written_whole

ABOUT = "prune.json"
BINS = 96
"""Columns of a heat strip, at most: units of an axis are joined to as many."""
FIELDS: Mapping[str, Any] = dict(
    model=str, to=str, score=str, numbers=int, kept=dict[str, dict[str, Any]],
    layers=dict[str, list[int]], before=dict[str, Any], scores=dict[str, list[float]] | None,
    distances=dict[str, float] | None, distilled=dict[str, Any] | None,
    search=dict[str, Any] | None,
)  # fmt: skip


def is_pruned(folder: Path) -> bool:
    """Tell whether `zoo prune` wrote a folder."""
    return (folder / ABOUT).is_file()


def read_pruned(folder: Path) -> dict[str, Any]:
    """Read what became of a parent.

    Raises:
        ValueError: `prune.json` is missing or damaged.
    """
    about = read_json(folder / ABOUT)
    for name, kind in FIELDS.items():
        checked(about.get(name), kind, f"{folder / ABOUT}, field {name},")
    return about


def build_pruned(folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` into a pruned model's folder; return the page's path.

    Raises:
        ValueError: `prune.json` is missing or damaged.
        OSError: the folder cannot be written to.
    """
    about = read_pruned(folder)
    gallery, notes = Gallery(folder / "figures"), []
    evaluations = _evaluations(folder / "run", notes) if about.get("distilled") else []
    page = template_of("pruned.html.j2").render(
        title=f"{about['model']}, pruned to {about['to']}",
        cards=_cards(about, evaluations),
        sizes=_sizes(about),
        tried=_tried(about),
        kept=_kept(about, gallery),
        scores=_scores(about, gallery),
        recovery=_recovery(evaluations, gallery),
        distilled=about.get("distilled"),
        search=_search(about.get("search") or {}, gallery),
        run="run/report.html" if (folder / "run" / "report.html").is_file() else None,
        notes=notes,
    )
    target = folder / "report.html"
    with written_whole(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


# ---------------------------------------------------------------- numbers


def _cards(about: Mapping, evaluations: Sequence[Mapping]) -> list[tuple[str, str, str]]:
    before, after = about["before"]["numbers"], about["numbers"]
    cards = [(f"{after / before:.0%}", "of the numbers stayed", f"{after:,} of {before:,}")]
    distance = (about.get("distances") or {}).get(about["score"])
    if distance is not None:
        cards.append((short_number(distance), "distance to the parent as cut", about["score"]))
    for key, name in (("perplexity", "perplexity"), ("fidelity/geomean", "mean fidelity")):
        _, values = series(evaluations, key)
        if values:
            cards.append((short_number(values[-1]), f"{name} at the end", short_number(values[0])))
    return cards


def _sizes(about: Mapping) -> Table:
    """Return sizes before and after, with a row for all layers of one form and size."""
    before, rows = about["before"], dict[tuple[str, str, str], int]()
    for axis, cut in about["kept"].items():
        row = (numbered(axis), str(before["sizes"][axis]), str(np.shape(cut["kept"])[-1]))
        rows[row] = rows.get(row, 0) + 1
    found = [
        Row(name + (f" ×{times}" if times > 1 else ""), [Cell(old), Cell(new)])
        for (name, old, new), times in rows.items()
    ]
    for path, kept in about["layers"].items():
        found.append(
            Row(f"layers of {path}", [Cell(str(before["layers"][path])), Cell(str(len(kept)))])
        )
    numbers = [Cell(f"{before['numbers']:,}"), Cell(f"{about['numbers']:,}")]
    return Table(["axis", "before", "after"], [*found, Row("numbers", numbers, strong=True)])


def _tried(about: Mapping) -> Table | None:
    distances = about.get("distances") or {}
    best = min(distances.values(), default=None)
    rows = [Row(n, [Cell(short_number(v), v == best)]) for n, v in distances.items()]
    return Table(["score", "distance to the parent"], rows) if rows else None


# ---------------------------------------------------------------- pictures


def _forms(axes: Sequence[str]) -> dict[str, list[str]]:
    """Group axes that differ only in the numbers of their layers, in the order of those."""
    forms: dict[str, list[str]] = {}
    for axis in axes:
        forms.setdefault(numbered(axis), []).append(axis)
    place = re.compile(r"\d+")
    return {
        form: sorted(group, key=lambda axis: [int(n) for n in place.findall(axis)])
        for form, group in forms.items()
    }


def _kept(about: Mapping, gallery: Gallery) -> list[PageImage]:
    """Draw which units stayed: a row for each layer, white where none did."""
    pictures = []
    for form, axes in _forms(list(about["kept"])).items():
        rows = [_share(about["kept"][a]["kept"], about["before"]["sizes"][a]) for a in axes]
        alt = f"{form}: {np.shape(about['kept'][axes[0]]['kept'])[-1]} units kept in the first row"
        pictures.append(gallery.add(heat(form, _even(rows), "units"), f"kept-{form}", alt))
    for path, kept in about["layers"].items():
        row = np.isin(np.arange(about["before"]["layers"][path]), kept).astype(float)
        png = heat(f"layers of {path}", row[None], "layers")
        pictures.append(gallery.add(png, f"layers-{path}", f"{path}: layers {kept} stayed"))
    return pictures


def _share(kept: Any, size: int) -> np.ndarray:
    """Return the share of units that stayed in each of at most `BINS` neighbourhoods."""
    chosen = np.atleast_2d(np.asarray(kept).reshape(-1, np.shape(kept)[-1]))
    stays = np.zeros((len(chosen), size))
    np.put_along_axis(stays, chosen, 1.0, axis=1)
    return np.array([part.mean() for part in np.array_split(stays.ravel(), min(BINS, stays.size))])


def _scores(about: Mapping, gallery: Gallery) -> list[PageImage]:
    """Draw the scores of each layer in falling order, as shares of the largest of all layers."""
    pictures, scores = [], about.get("scores") or {}
    for form, axes in _forms(list(scores)).items():
        rows = _even([np.asarray(scores[axis], float) for axis in axes])
        low, high = np.nanmin(rows), np.nanmax(rows)
        shown = (rows - low) / (high - low) if high > low else np.ones_like(rows)
        png = heat(form, shown, "units by falling score")
        alt = f"{form}: scores from {short_number(float(high))} to {short_number(float(low))}"
        pictures.append(gallery.add(png, f"scores-{form}", alt))
    return pictures


def _even(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack rows, the shorter ones filled up with nothing."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])


def heat(title: str, rows: np.ndarray, xlabel: str) -> bytes:
    """Draw values from 0 (white) to 1 as a strip for each row, as a PNG.

    Args:
        rows: [layers, columns]; NaN is left out.
    """
    height = 1.0 + min(2.6, 0.14 * len(rows) + 0.1)
    with figures.canvas(title, height, left=0.56, below=0.45) as (axes, done):
        axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel(xlabel)
        axes.set_xticks([])
        axes.set_yticks([0, len(rows) - 1] if len(rows) > 1 else [])
        axes.set_ylabel("layer" if len(rows) > 1 else "")
    return done[0]


def _evaluations(run: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the student's evaluations by step; at step 0 those of the child as it was cut."""
    rows = [row for row in read_lines(run / "metrics.jsonl", notes) if row.get("kind") == "eval"]
    first = [row | dict(step=0) for row in rows if row.get("arm") == UNTRAINED]
    mine = [row for row in rows if row.get("arm", "student") == "student"]
    return sorted([*first, *mine], key=lambda row: row["step"])


def _recovery(evaluations: Sequence[Mapping], gallery: Gallery) -> list[PageImage]:
    pictures = []
    wanted = re.compile(r"kl/.+|perplexity|fidelity/geomean|knn/top1|linear/top1")
    keys = dict.fromkeys(k for row in evaluations for k in row if wanted.fullmatch(k))
    for key in keys:
        steps, values = series(evaluations, key)
        if len(values) > 1:
            png = figures.curves(key, [(key, steps, values, figures.STUDENT_COLOUR)])
            alt = f"{key} from {short_number(values[0])} to {short_number(values[-1])}"
            pictures.append(gallery.add(png, f"recovery-{key}", alt))
    return pictures


def _search(search: Mapping, gallery: Gallery) -> list[PageImage]:
    """Draw the distance of each candidate over its cost, which is a number or one of several."""
    points: dict[str, list[plots.Point]] = {}
    for candidate in search.get("candidates") or []:
        cost, far = candidate.get("cost"), number(candidate.get("distance"))
        for name, value in cost.items() if isinstance(cost, dict) else [("cost", cost)]:
            x = number(value)
            if x and far is not None:
                chosen = candidate.get("chosen")
                colour = figures.STUDENT_COLOUR if chosen else figures.FAINT
                label = str(candidate.get("to", "")) if chosen else ""
                points.setdefault(name, []).append((x, far, label, colour))
    pictures = []
    for name, found in points.items():
        png = plots.quality(
            "candidates", name, "distance to the parent", found, more_is_better=False, lower=True
        )
        alt = f"{len(found)} candidates by {name} and distance"
        pictures.append(gallery.add(png, f"search-{name}", alt))
    return pictures
