"""The plots of the joined report: a radar of capabilities, and quality against cost."""

import io
import math
from collections.abc import Sequence
from typing import Any

from zoo.eval.report.figures import DPI, FAINT, INK, STYLE, plain_ticks, shorten
from zoo.eval.speed.pareto import frontier, label_points

Point = tuple[float, float, str, str]
"""Cost, quality, name and colour."""


def radar(axes: Sequence[str], lines: Sequence[tuple[str, Sequence[float | None], str]]) -> bytes:
    """Draw each model as a polygon over the axes, with 0 in the middle and 1 at the rim, as a PNG.

    Axes on which a model has no number are skipped.

    Args:
        axes: Names of the axes.
        lines: Name of a model, its share of the perfect score on each axis, and its colour.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.4), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.2, 0.2, 0.8, 0.92)
        panel: Any = figure.add_subplot(projection="polar")
        panel.set_theta_offset(math.pi / 2)  # the first axis points up, the others follow clockwise
        panel.set_theta_direction(-1)
        for name, shares, colour in lines:
            known = [(a, s) for a, s in zip(angles, shares, strict=True) if s is not None]
            ring = [*known, known[0]]
            panel.plot(
                *zip(*ring, strict=True),
                color=colour,
                linewidth=1.8,
                marker="o",
                markersize=3.5,
                label=shorten(name, 34),
            )
            panel.fill(*zip(*ring, strict=True), color=colour, alpha=0.07)
        panel.set_ylim(0, 1)
        panel.set_yticks([0.25, 0.5, 0.75, 1], ["25 %", "50 %", "75 %", ""], fontsize=8)
        panel.set_xticks(angles, [])
        for angle, name in zip(angles, axes, strict=True):  # outside of the rim
            right = math.sin(angle)
            side = "center" if abs(right) < 0.1 else "left" if right > 0 else "right"
            panel.text(angle, 1.07, shorten(name, 40), ha=side, va="center", color=INK)
        panel.spines["polar"].set_color(FAINT)
        figure.legend(loc="lower center", ncols=2, labelcolor=INK)
        return _png(figure)


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
