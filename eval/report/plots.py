"""Quality against cost as a PNG, for a picture and the page of a pruned model."""

import io
from collections.abc import Sequence
from typing import Any

from zoo.eval.report.figures import DPI, FAINT, INK, STYLE, plain_ticks, shorten
from zoo.eval.speed.pareto import frontier, label_points

Point = tuple[float, float, str, str]
"""Cost, quality, name and colour."""


def quality(
    title: str,
    cost: str,
    measure: str,
    points: Sequence[Point],
    *,
    more_is_better: bool,
    lower: bool = False,
) -> bytes:
    """Draw quality over a cost on a log axis, with the Pareto frontier as a line, as a PNG.

    Args:
        cost: Label of the axis of the cost.
        measure: Label of the axis of the quality.
        more_is_better: The cost is a speed, so the best models are on the right.
        lower: The quality is an error, so the best models are at the bottom.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sign, way = 1 if more_is_better else -1, -1 if lower else 1
    best = frontier([(sign * x, way * y) for x, y, _, _ in points])
    line = [(sign * x, way * y) for x, y in best]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3, 3.6), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.16, 0.15, 0.97, 0.9)
        figure.text(0.02, 0.985, shorten(title, 38), va="top", size=11.5, weight="bold")
        axes = figure.add_subplot()
        axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1, zorder=1)
        for x, y, _, colour in points:
            axes.scatter(x, y, color=colour, s=28, zorder=2)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_xlabel(cost)
        axes.set_ylabel(measure)
        axes.margins(0.25)
        axes.grid(True)
        label_points(axes, [(x, y, shorten(name, 24), INK) for x, y, name, _ in points])
        return _png(figure)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
