"""Learning curves: bits a byte, phone books and copying, by the bytes that were learnt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.experiments.compression.figure import COLOURS, STYLE

PANELS = (
    ("bits a byte of files", 1),
    ("phone books, % of bytes right", 2),
    ("copying, % of bytes right", 3),
)
"""What is drawn, and where a point of a row's curve has it."""


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw curves.png and curves.svg into `out`: the mean of the seeds, and their range."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [row for row in rows if not row["context"]]
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.6, 2.9), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(PANELS))
        for number, tower in enumerate(dict.fromkeys(row["tower"] for row in trained)):
            curves = np.array([row["curve"] for row in trained if row["tower"] == tower])
            megabytes = curves[0, :, 0] / 1e6
            for panel, (title, column) in zip(panels, PANELS, strict=True):
                seeds, colour = curves[:, :, column], COLOURS[number % len(COLOURS)]
                panel.plot(megabytes, seeds.mean(0), color=colour, marker="o", ms=3, label=tower)
                panel.fill_between(megabytes, seeds.min(0), seeds.max(0), color=colour, alpha=0.15)
                panel.set_title(title)
                panel.set_xlabel("MB learnt")
        for panel in panels[1:]:
            panel.set_ylim(-3, 103)
        panels[0].legend()
        figure.savefig(out / "curves.png", metadata={"Software": None})
        figure.savefig(out / "curves.svg", metadata={"Date": None})
