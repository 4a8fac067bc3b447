"""The plot of a search for a smaller model: cost against distance to the parent."""

import io
from collections.abc import Mapping
from typing import Any

from zoo.eval.report.figures import DPI, FAINT, STUDENT_COLOUR, STYLE, plain_ticks, shorten
from zoo.eval.speed.pareto import frontier

COSTS = {
    "flops": ("GFLOPs", 1e9),
    "params": ("million parameters", 1e6),
    "latency_ms": ("ms", 1.0),
}
"""What the candidates of a budget may still differ in, in this order; its name and unit."""


def draw_search(search: Mapping[str, Any]) -> bytes:
    """Draw the candidates, the Pareto frontier as a line and the chosen one in colour, as a PNG.

    Args:
        search: The key `search` of a child's `prune.json`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in search["candidates"] if row["distance"] is not None]
    costs = [{**row["cost"], "latency_ms": row["latency_ms"]} for row in rows]
    free = [k for k in COSTS if k not in search["budgets"] and all(c[k] is not None for c in costs)]
    key = free[0] if free else "params"
    label, unit = COSTS[key]
    points = [(c[key] / unit, row["distance"]) for c, row in zip(costs, rows, strict=True)]
    line = [(-x, -y) for x, y in frontier([(-x, -y) for x, y in points])]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.12, 0.15, 0.97, 0.84)
        budgets = ", ".join(f"{what}={amount:g}" for what, amount in search["budgets"].items())
        figure.text(0.02, 0.985, f"Candidates at {budgets}", va="top", size=11.5, weight="bold")
        nearest = "nearest to the parent, blue: " + shorten(search["chosen"], 80)
        figure.text(0.02, 0.92, nearest, va="top", size=9.5, color=FAINT)
        axes: Any = figure.add_subplot()
        axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1, zorder=1)
        for (x, y), row in zip(points, rows, strict=True):
            is_chosen = row["words"] == search["chosen"]
            axes.scatter(x, y, color=STUDENT_COLOUR if is_chosen else FAINT, s=28, zorder=2)
        axes.set_xlabel(label)
        axes.set_ylabel("distance to the parent")
        axes.margins(0.2)
        axes.grid(True)
        plain_ticks(axes.xaxis)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()
