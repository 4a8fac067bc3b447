"""The figure of the PHI-S experiment: each arm's fidelity to each teacher, and the paired gaps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.report.figures import ARM_COLOURS, GRID, INK, STUDENT_COLOUR, STYLE, plain_ticks
from zoo.experiments.intervals import SeedDifference

Rows = Sequence[Mapping[str, Any]]
"""One row a student: its set, arm, seed and measures."""

Pairs = Mapping[str, Mapping[str, Mapping[str, SeedDifference]]]
"""Set -> arm -> measure -> the difference of PHI-S to the arm."""


def teachers_of(rows: Rows) -> list[str]:
    """Return the teachers' labels, in order."""
    names = [key.partition("/")[2] for key in rows[0] if key.startswith("fidelity/")]
    return [name for name in names if name not in ("min", "geomean")]


def draw(rows: Rows, pairs: Pairs, out: Path) -> None:
    """Write phi_s.png and phi_s.svg into `out`.

    Args:
        pairs: The fidelities of its first set's students are shown, and the gaps of all sets.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.6), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        shown = next(iter(pairs))
        _fidelities(left, [row for row in rows if row["set"] == shown])
        _gaps(right, pairs)
        figure.savefig(out / "phi_s.png", metadata={"Software": None})
        figure.savefig(out / "phi_s.svg", metadata={"Date": None})


def _fidelities(axes: Any, rows: Rows) -> None:
    """Plot the fidelities: a group for each arm, a colour for each teacher, a dot for each seed."""
    arms, names = list(dict.fromkeys(row["arm"] for row in rows)), teachers_of(rows)
    for number, name in enumerate((*names, "geomean")):
        colour = ARM_COLOURS[1:][number] if name != "geomean" else INK
        columns = np.arange(len(arms)) + 0.18 * (number - len(names) / 2)
        for x, arm in zip(columns, arms, strict=True):
            values = [row[f"fidelity/{name}"] for row in rows if row["arm"] == arm]
            label = (name if name != "geomean" else "geometric mean") if arm == arms[0] else None
            dots = dict(markersize=3.5, alpha=0.6, color=colour, label=label)
            axes.plot([x] * len(values), values, "o", **dots)
            axes.plot([x - 0.07, x + 0.07], [np.mean(values)] * 2, color=colour)
    axes.axhline(1, color=GRID, zorder=0)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(range(len(arms)), arms, rotation=35, ha="right", size=8.5)
    axes.set_ylabel("fidelity on held-out images (1: the mean)")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _gaps(axes: Any, pairs: Pairs) -> None:
    """Plot the ratio of PHI-S to each other arm, with intervals, on a logarithmic axis."""
    lines = [
        (f"{arm} ({name})" if name != "arms" else arm, measures["fidelity/geomean"])
        for name, arms in pairs.items()
        for arm, measures in arms.items()
    ][::-1]
    for y, (_, found) in enumerate(lines):
        low, middle, high = (1 + v / 100 for v in (found.low, found.mean, found.high))
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [y, y], color=STUDENT_COLOUR)
        axes.plot(middle, y, "o", color=STUDENT_COLOUR)
        text = f"{found.mean:+.1f} %" if abs(found.mean) < 100 else f"x{middle:.3g}"
        axes.annotate(text, (middle, y), (0, 5), textcoords="offset points", ha="center", size=8)
    axes.axvline(1, color=GRID, zorder=0)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.margins(x=0.15, y=0.1)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.set_xlabel("geometric-mean fidelity, PHI-S over the arm")
