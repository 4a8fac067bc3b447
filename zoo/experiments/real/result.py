"""The results of the experiment with real teachers: tables, figures, a page."""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.report.figures import ARM_COLOURS, STUDENT_COLOUR, STYLE
from zoo.experiments.intervals import SeedDifference, compare_seeds
from zoo.experiments.page import Part, write_page
from zoo.experiments.real.cells import SEVERAL
from zoo.experiments.tables import markdown, print_table

Rows = Sequence[Mapping[str, Any]]
NOT_COMPARED = ("phi_s", SEVERAL)
"""Arms from which phi_s is not subtracted."""


def report(rows: Rows, about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write result.json, result.md, result.html and the figures into `out`; print the tables.

    Args:
        about: The config, the data, the device, and the cells that are left.

    Returns:
        The content of result.json.
    """
    rows = [row for row in rows if "values" in row]
    measures = list(rows[0]["values"]) if rows else []
    gaps = compare(rows, measures)
    text = _introduction(about)
    parts = [
        Part("teachers and students", *_accuracies(rows, measures)),
        Part("phi_s minus, points", *_gap_table(gaps, measures)),
        Part("phi_s minus each teacher, points", *_teacher_gaps(rows, measures)),
        Part("by resolution", *_by_size(rows, measures)),
        Part("fidelity to the teachers, on their own grids", *_fidelities(rows)),
        Part("all seeds", *_all_seeds(rows, measures)),
    ]
    parts = [part for part in parts if part.body]
    figures = _draw(rows, measures, out) if rows else {}
    lines = ["# Students of published networks", "", *(line for p in text for line in (p, ""))]
    for part in parts:
        print_table(part.title, part.head, part.body)
        lines += [f"## {part.title}", "", *markdown(part.head, part.body), ""]
    lines += [f"![{alt}]({name})" for name, alt in figures.items()]
    (out / "result.md").write_text("\n".join(lines) + "\n")
    write_page(out / "result.html", "Students of published networks", text, parts, figures)
    differences = {
        " - ".join(k): {m: vars(d) for m, d in found.items()} for k, found in gaps.items()
    }
    result = dict(about, rows=list(rows), paired=differences)
    (out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"result  {out / 'result.html'}")
    return result


def _introduction(about: Mapping[str, Any]) -> list[str]:
    config, data = about["config"], about["data"]
    sets = "; ".join(
        f"{name} has {found['classes']} classes, {found['bank']:,} pictures to fit and "
        f"{found['tested']:,} to test, so one network's accuracy has a standard error of up to "
        f"{50 / max(1, found['tested']) ** 0.5:.1f} points"
        for name, found in data["labelled"].items()
    )
    dense = "" if config["dense"] == "none" else f", pretext:{config['dense']} (trained here)"
    text = [
        f"{data['images']:,} photographs to learn from, without labels; batches of "
        f"{config['batch']} at {config['size']} px, learning rate {config['rate']:g}. Teachers: "
        f"{', '.join(config['teachers'])}{dense}. On {about['device']}, torch {about['torch']}.",
        f"kNN and linear probe of the pooled vector, in per cent. {sets}.",
        "phi_s, none and what else is not named here learn from the teachers and differ in the "
        "scale on which maps are matched; labels is the same backbone, from the same start, that "
        "learnt the labels of all these data sets alone, for as many steps at the same rate; "
        "untrained is that start. Mean ± deviation over seeds; differences are paired by seed, "
        "with 95 % intervals by Student's t where there are two seeds or more. Those speak of "
        "other seeds, not of other teachers or data. Teachers are measured at their own "
        "resolution.",
    ]
    if left := about.get("left"):
        text.append(f"Not run yet: {', '.join(left)}.")
    if failed := about.get("failed"):
        text.append("Failed: " + "; ".join(f"{key}: {why}" for key, why in failed.items()) + ".")
    return text


def _by_seed(rows: Rows, student: str, arm: str) -> dict[int, Mapping[str, Any]]:
    return {r["seed"]: r for r in rows if r["student"] == student and r["arm"] == arm}


def _students(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["student"] for row in rows if row["arm"] != "teacher"))


def compare(
    rows: Rows, measures: Sequence[str]
) -> dict[tuple[str, str], dict[str, SeedDifference]]:
    """Compare each student's arm phi_s with its other arms, seed by seed.

    Returns:
        (student, other arm) -> measure -> difference.
    """
    found = {}
    for student in _students(rows):
        ours = _by_seed(rows, student, "phi_s")
        for arm in dict.fromkeys(row["arm"] for row in rows if row["student"] == student):
            if arm in NOT_COMPARED:
                continue
            theirs = _by_seed(rows, student, arm)
            seeds = sorted(set(ours) & set(theirs))
            if seeds:
                found[student, arm] = {
                    m: compare_seeds(*([side[s]["values"][m] for s in seeds]
                                       for side in (ours, theirs)))
                    for m in measures
                }  # fmt: skip
    return found


def _accuracies(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    body = []
    for student, arm in dict.fromkeys((row["student"], row["arm"]) for row in rows):
        mine = list(_by_seed(rows, student, arm).values())
        values = [spread([row["values"][m] for row in mine]) for m in measures]
        steps = f"{mine[0]['steps']:,}" if "steps" in mine[0] else "-"
        step = f"{np.mean([r['step_ms'] for r in mine]):.1f}" if "step_ms" in mine[0] else "-"
        name = f"teacher {student}" if arm == "teacher" else f"{student} {arm}"
        size = f"{mine[0]['parameters'] / 1e6:.2f} M"
        body.append([name, size, steps, *values, step, str(len(mine))])
    return ["model", "parameters", "steps", *measures, "ms a step", "seeds"], body


def spread(values: Sequence[float]) -> str:
    """Return mean ± deviation as text."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def _gap_table(
    gaps: Mapping[tuple[str, str], Mapping[str, SeedDifference]], measures: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    return ["student, minus", *measures], [
        [f"{student}, {arm}", *(found[m].describe() for m in measures)]
        for (student, arm), found in gaps.items()
    ]


def _teacher_gaps(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    body = []
    for student in _students(rows):
        mine = list(_by_seed(rows, student, "phi_s").values())
        for teacher in (row for row in rows if row["arm"] == "teacher") if mine else ():
            found = [
                compare_seeds([r["values"][m] for r in mine], [teacher["values"][m]] * len(mine))
                for m in measures
            ]
            body.append([f"{student} - {teacher['student']}", *(d.describe() for d in found)])
    return ["student - teacher", *measures], body


def _by_size(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    body = []
    for (student, arm), mine in _sized(rows).items():
        name = "at several sizes" if arm == SEVERAL else "at one size"
        for size in mine[0]["by_size"]:
            values = (spread([row["by_size"][size][m] for row in mine]) for m in measures)
            body.append([f"{student}, trained {name}", size, *values])
    return ["student", "px", *measures], body


def _sized(rows: Rows) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the rows that were measured at several sizes, by student and arm."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("by_size"):
            found.setdefault((row["student"], row["arm"]), []).append(row)
    return found


def _fidelities(rows: Rows) -> tuple[list[str], list[list[str]]]:
    prefix = "fidelity_own_grid/"
    close = [row for row in rows if row.get("fidelity")]
    names = [k for k in (close[0]["fidelity"] if close else {}) if k.startswith(prefix)]
    body = []
    for student, arm in dict.fromkeys((row["student"], row["arm"]) for row in close):
        mine = list(_by_seed(close, student, arm).values())
        values = (f"{np.mean([row['fidelity'][n] for row in mine]):.2f}" for n in names)
        body.append([f"{student} {arm}", *values])
    return ["student", *(name.removeprefix(prefix) for name in names)], body


def _all_seeds(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    body = [
        [f"{row['student']} {row['arm']}", str(row["seed"]),
         *(f"{row['values'][m]:.1f}" for m in measures)]
        for row in rows
        if row["arm"] not in ("teacher", "untrained")
    ]  # fmt: skip
    return ["student", "seed", *measures], body


COLOURS = {
    "phi_s": STUDENT_COLOUR,
    "labels": "#1d1f23",
    "none": ARM_COLOURS[1],
    "standardize": ARM_COLOURS[2],
    "alpha_only": ARM_COLOURS[3],
    "global": ARM_COLOURS[4],
    "pca": ARM_COLOURS[5],
    SEVERAL: "#38a3f5",
    "untrained": ARM_COLOURS[0],
}
"""Of the arms in the figure."""
LINES = (":", "--", "-.", (0, (1, 3)), (0, (5, 5)))
"""Of the teachers, in turn."""


def _draw(rows: Rows, measures: Sequence[str], out: Path) -> dict[str, str]:
    """Draw a panel for each measure: students and teachers; and by size, where that is known.

    Returns:
        Names of the files, and what they show.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, paint, alt in (
            ("students", _paint_students, "accuracy of students and teachers"),
            ("sizes", _paint_sizes, "accuracy by resolution"),
        ):
            figure = Figure(figsize=(3.6 * len(measures), 4.0), dpi=100, layout="constrained")
            FigureCanvasAgg(figure)
            panels = figure.subplots(1, len(measures), squeeze=False)[0]
            for panel, measure in zip(panels, measures, strict=True):
                paint(panel, rows, measure)
                panel.set_title(measure, loc="left", size=10)
            panels[0].set_ylabel("per cent right")
            handles, labels = panels[0].get_legend_handles_labels()
            if handles:
                figure.legend(
                    handles, labels, loc="outside upper center", ncols=min(5, len(labels))
                )
                figure.savefig(out / f"{name}.png", metadata={"Software": None})
                figures[f"{name}.png"] = alt
    return figures


def _paint_students(panel: Any, rows: Rows, measure: str) -> None:
    teachers = [row for row in rows if row["arm"] == "teacher"]
    for row, line in zip(teachers, cycle(LINES), strict=False):
        value = row["values"][measure]
        panel.axhline(
            value, color="#8a8f98", linestyle=line, linewidth=1, label=f"teacher {row['student']}"
        )
    students, known = _students(rows), set[str]()
    for x, student in enumerate(students):
        arms = [arm for arm in COLOURS if _by_seed(rows, student, arm)]
        for number, arm in enumerate(arms):
            found = [row["values"][measure] for row in _by_seed(rows, student, arm).values()]
            at = [x + 0.11 * (number - (len(arms) - 1) / 2)] * len(found)
            label, colour = None if arm in known else arm, COLOURS[arm]
            panel.plot(at, found, "o", markersize=4.5, alpha=0.75, color=colour, label=label)
            known.add(arm)
    panel.set_xticks(range(len(students)), students, rotation=25, ha="right")


def _paint_sizes(panel: Any, rows: Rows, measure: str) -> None:
    for (_, arm), mine in _sized(rows).items():
        several, names = arm == SEVERAL, list(mine[0]["by_size"])
        sizes = list(map(int, names))
        values = [np.mean([row["by_size"][name][measure] for row in mine]) for name in names]
        label = "trained at several sizes" if several else "trained at one size"
        panel.plot(sizes, values, "o-", color=ARM_COLOURS[1] if several else STUDENT_COLOUR,
                   label=label)  # fmt: skip
        panel.set_xticks(sizes)
    panel.set_xlabel("px")
