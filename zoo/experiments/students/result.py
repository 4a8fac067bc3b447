"""The results of the students' experiment: tables, a figure, one page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.report.figures import ARM_COLOURS, STUDENT_COLOUR, STYLE
from zoo.experiments.imposed import SCALES
from zoo.experiments.intervals import SeedDifference, compare_seeds
from zoo.experiments.tables import markdown, print_table

Rows = Sequence[Mapping[str, Any]]


def report(rows: Rows, about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write result.json, result.md and the figure into `out`, and print the tables.

    Args:
        about: The config, the steps, the device and the seconds of the run.

    Returns:
        The content of result.json.
    """
    planned = about["config"]["steps"]
    lines = [
        "# One student of each family: its teachers, and itself alone",
        "",
        f"{about.get('steps')} steps of batch {about['config']['batch']} at "
        f"{about['config']['size']} px on {about.get('device')}, {about['seconds']:.0f} s in all; "
        f"{about.get('pictures')} pictures. The teachers were trained on them first. *distilled* "
        "learns from the three teachers and sees no label; *alone* is the same backbone, from the "
        "same start, trained on the labels with the same crops and steps. Per cent right, mean ± "
        "deviation over seeds; differences are paired by seed, with 95 % "
        "intervals by Student's t.",
        "",
        f"The scales of the teachers' maps (deviations {_imposed()}: those of PHI-S, 2410.01680, "
        "table 7, with gains and offsets of the channels) are imposed by this experiment; they are "
        "not the networks' own.",
    ]
    if about.get("steps") not in (planned, None):
        lines += ["", f"**Reduced: {about['steps']} steps instead of {planned}.**"]
    measures = [k for k in (rows[0] if rows else {}) if k.startswith(("knn/", "linear/"))]
    gaps = compare(rows, measures)
    parts = [
        ("teachers and students", *_accuracies(rows, measures)),
        ("distilled minus alone, points", *_gap_table(gaps, measures)),
        ("distilled minus each teacher, points", *_teacher_gaps(rows, measures)),
        ("fidelity of the distilled students to their teachers", *_fidelities(rows)),
        ("all seeds", *_all_seeds(rows, measures)),
    ]
    for title, head, body in parts:
        if body:
            print_table(title, head, body)
            lines += ["", f"## {title}", "", *markdown(head, body)]
    if gaps:
        _draw(rows, measures, out)
        lines += ["", "![kNN and linear probe](students.png)"]
    differences = {f: {m: vars(p) for m, p in found.items()} for f, found in gaps.items()}
    result = dict(about, rows=list(rows), paired=differences)
    (out / "result.md").write_text("\n".join(lines) + "\n")
    (out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"result  {out / 'result.md'}")
    return result


def _imposed() -> str:
    return ", ".join(f"{label} {scale['std']:g}" for label, scale in SCALES.items())


def compare(rows: Rows, measures: Sequence[str]) -> dict[str, dict[str, SeedDifference]]:
    """Compare each family's distilled students with those trained on labels, seed by seed.

    Returns:
        Family -> measure -> difference.
    """
    found = {}
    for family in _families(rows):
        ways = {w: _by_seed(rows, family, w) for w in ("distilled", "alone")}
        seeds = sorted(set(ways["distilled"]) & set(ways["alone"]))
        if seeds:
            found[family] = {
                m: compare_seeds(*([ways[w][s][m] for s in seeds] for w in ("distilled", "alone")))
                for m in measures
            }
    return found


def _families(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in rows if row["family"] != "teacher"))


def _by_seed(rows: Rows, family: str, way: str) -> dict[int, Mapping[str, Any]]:
    return {r["seed"]: r for r in rows if r["family"] == family and r["way"] == way}


def _accuracies(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    body = []
    for key in dict.fromkeys((row["family"], row["way"]) for row in rows):
        mine = [row for row in rows if (row["family"], row["way"]) == key]
        cells = [_spread([row[m] for row in mine]) for m in measures]
        step = f"{np.mean([r['step_ms'] for r in mine]):.1f}" if "step_ms" in mine[0] else "-"
        body.append([" ".join(key), f"{mine[0]['parameters'] / 1e6:.2f} M", *cells, step])
    return ["model", "parameters", *measures, "ms a step"], body


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _gap_table(
    gaps: Mapping[str, Mapping[str, SeedDifference]], measures: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    return ["family", *measures], [
        [family, *(found[m].describe() for m in measures)] for family, found in gaps.items()
    ]


def _teacher_gaps(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the differences between the students' mean over seeds and the teacher's value."""
    body = []
    for family in _families(rows):
        mine = list(_by_seed(rows, family, "distilled").values())
        for teacher in (row for row in rows if row["family"] == "teacher"):
            gaps = [float(np.mean([row[m] for row in mine])) - teacher[m] for m in measures]
            body.append([f"{family} - {teacher['way']}", *(f"{gap:+.1f}" for gap in gaps)])
    return ["student - teacher", *measures], body


def _fidelities(rows: Rows) -> tuple[list[str], list[list[str]]]:
    distilled = [row for row in rows if row["way"] == "distilled"]
    # on the teachers' own grids: the families' strides differ
    prefix = "fidelity_own_grid/"
    names = [k for k in (distilled[0] if distilled else {}) if k.startswith(prefix)]
    body = []
    for family in _families(rows):
        mine = list(_by_seed(rows, family, "distilled").values())
        if mine:
            cells = [f"{np.mean([row[n] for row in mine]):.2f}" for n in names]
            body.append([family, *cells])
    return ["family", *(n.removeprefix(prefix) for n in names)], body


def _all_seeds(rows: Rows, measures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    body = [
        [f"{row['family']} {row['way']}", str(row["seed"]), *(f"{row[m]:.1f}" for m in measures)]
        for row in rows
        if row["family"] != "teacher"
    ]
    return ["student", "seed", *measures], body


def _draw(rows: Rows, measures: Sequence[str], out: Path) -> None:
    """Plot a panel for each measure: dots for seeds, lines for the teachers."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = _families(rows)
    teachers = [row for row in rows if row["family"] == "teacher"]
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure = Figure(figsize=(3.4 * len(measures), 3.8), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for panel, measure in zip(panels, measures, strict=True):
            for colour, row in zip(ARM_COLOURS[1:], teachers, strict=False):
                panel.axhline(
                    row[measure], color=colour, linestyle=":", label=f"teacher {row['way']}"
                )
            for shift, colour, way in (
                (-0.12, STUDENT_COLOUR, "distilled"),
                (0.12, "#333", "alone"),
            ):
                for x, family in enumerate(families):
                    values = [r[measure] for r in _by_seed(rows, family, way).values()]
                    dots = dict(markersize=4.5, alpha=0.7, color=colour)
                    label = None if x else way
                    panel.plot([x + shift] * len(values), values, "o", label=label, **dots)
            panel.set_xticks(range(len(families)), families, rotation=25, ha="right")
            panel.set_title(measure, loc="left", size=10)
        panels[0].set_ylabel("per cent right")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        figure.savefig(out / "students.png", metadata={"Software": None})
        figure.savefig(out / "students.svg", metadata={"Date": None})
