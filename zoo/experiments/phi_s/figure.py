"""The figure of the PHI-S experiment: what each arm gives of each teacher, and the paired gaps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.report.figures import ARM_COLOURS, GRID, INK, STUDENT_COLOUR, STYLE, plain_ticks
from zoo.experiments.intervals import Paired

Rows = Sequence[Mapping[str, Any]]


def teachers_of(rows: Rows) -> list[str]:
    """Return the teachers' labels, in order."""
    names = [key.partition("/")[2] for key in rows[0] if key.startswith("fidelity/")]
    return [name for name in names if name not in ("min", "geomean")]


Pairs = Mapping[str, Mapping[str, Mapping[str, Paired]]]


def draw(rows: Sequence[Mapping[str, Any]], pairs: Pairs, out: Path) -> None:
    """Write phi_s.png and phi_s.svg into `out`."""
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


def _fidelities(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One group an arm, one colour a teacher, one dot a seed."""
    arms, names = list(dict.fromkeys(row["arm"] for row in rows)), teachers_of(rows)
    for number, name in enumerate((*names, "geomean")):
        colour = ARM_COLOURS[1:][number] if name != "geomean" else INK
        places = np.arange(len(arms)) + 0.18 * (number - len(names) / 2)
        for place, arm in zip(places, arms, strict=True):
            values = [row[f"fidelity/{name}"] for row in rows if row["arm"] == arm]
            label = (name if name != "geomean" else "geometric mean") if arm == arms[0] else None
            axes.plot(
                [place] * len(values), values, "o", markersize=3.5, alpha=0.6, color=colour,
                label=label,
            )  # fmt: skip
            axes.plot([place - 0.07, place + 0.07], [np.mean(values)] * 2, color=colour)
    axes.axhline(1, color=GRID, zorder=0)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(range(len(arms)), arms, rotation=35, ha="right", size=8.5)
    axes.set_ylabel("fidelity on held-out images (1: the mean)")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _gaps(axes: Any, pairs: Pairs) -> None:
    """PHI-S over each other arm, with intervals; a factor, on a logarithmic axis."""
    lines = [
        (f"{arm} ({name})" if name != "arms" else arm, measures["fidelity/geomean"])
        for name, arms in pairs.items()
        for arm, measures in arms.items()
    ][::-1]
    for place, (_, found) in enumerate(lines):
        low, middle, high = (1 + v / 100 for v in (found.low, found.mean, found.high))
        axes.plot([low, high], [place, place], color=STUDENT_COLOUR)
        axes.plot(middle, place, "o", color=STUDENT_COLOUR)
        axes.annotate(
            f"{found.mean:+.1f} %" if abs(found.mean) < 100 else f"x{middle:.3g}",
            (middle, place), (0, 5), textcoords="offset points",
            ha="center", size=8,
        )  # fmt: skip
    axes.axvline(1, color=GRID, zorder=0)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.margins(x=0.15, y=0.1)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.set_xlabel("geometric-mean fidelity, PHI-S over the arm")
