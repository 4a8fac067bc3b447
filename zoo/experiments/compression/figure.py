"""The figure of the compression experiment: bits a byte against bytes seen, an arm a panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.report.figures import ARM_COLOURS, STUDENT_COLOUR, STYLE

COLOURS = (STUDENT_COLOUR, *ARM_COLOURS[1:], ARM_COLOURS[0], "#333333")


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write compression.png and compression.svg into `out`: means over seeds."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.2 * len(arms), 4.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        for panel, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
            _curves(panel, [row for row in rows if row["arm"] == arm])
            panel.set_title(arm, loc="left", size=10)
            panel.set_xlabel("megabytes seen")
        figure.savefig(out / "compression.png", metadata={"Software": None})
        figure.savefig(out / "compression.svg", metadata={"Date": None})


def _curves(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot a line for each way, at the smallest share; a dot where nothing is trained."""
    share = min(row["share"] for row in rows)
    rows = [row for row in rows if row["share"] == share]
    first = min((c[0] for row in rows for c in row["curve"] if c[0]), default=1)
    for i, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        mine = [row for row in rows if row["way"] == way]
        rate = min(mine, key=lambda row: row["curve"][-1][1])["rate"]
        curves = [row["curve"] for row in mine if row["rate"] == rate]
        sizes = [max(point[0], first / 2) / 1e6 for point in curves[0]]  # 0 has no logarithm
        bits = np.mean([[point[1] for point in curve] for curve in curves], axis=0)
        panel.plot(sizes, bits, "o-", markersize=3, color=COLOURS[i % len(COLOURS)], label=way)
    panel.set_xscale("log")
    panel.set_ylabel("bits a byte, held out")
    panel.legend(fontsize=7)
