"""Draw how time and memory grow with the size of the image."""

import io
from collections.abc import Sequence
from typing import Any

from zoo.eval.report.figures import FAINT, STYLE, plain_ticks
from zoo.eval.speed.models import Measured, words


def series(rows: Sequence[Measured]) -> dict[tuple[str, bool], list[Measured]]:
    """Group rows by (model, whether it trains), each from the smallest image to the largest.

    Of several modes at a size the fastest is used; a model with only one size is left out.
    """
    best: dict[tuple[str, bool, int], Measured] = {}
    for row in rows:
        if not row.seconds:
            continue
        key = row.case.model, "train" in words(row.case.mode), row.case.size
        if key not in best or row.images_per_s > best[key].images_per_s:
            best[key] = row
    found: dict[tuple[str, bool], list[Measured]] = {}
    for (model, training, _), row in sorted(best.items()):
        found.setdefault((model, training), []).append(row)
    return {key: line for key, line in found.items() if len(line) > 1}


def draw_growth(rows: Sequence[Measured]) -> bytes:
    """Draw the time and the peak memory per image against its pixels, as a PNG.

    The thin lines are proportional to the pixels: a model that is parallel to them costs the same
    per pixel at every size.

    Raises:
        ValueError: no model was measured at two sizes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = series(rows)
    if not lines:
        raise ValueError("There is no growth to draw; measure a model at two sizes or more.")
    colours = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(model for model, _ in lines))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        for i, (label, measure) in enumerate((("ms per image", _ms), ("peak MiB per image", _mib))):
            axes = figure.add_subplot(1, 2, i + 1)
            for (model, training), line in lines.items():
                points = [(r.case.size**2 / 1e6, y) for r in line if (y := measure(r)) is not None]
                if not points:
                    continue
                name = f"{model}, {'forward + backward' if training else 'inference'}"
                style: dict[str, Any] = dict(
                    color=colours[model], linestyle="--" if training else "-", marker="o"
                )
                axes.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
                axes.axline(points[0], (10 * points[0][0], 10 * points[0][1]), color=FAINT, lw=0.5)
            axes.set_xscale("log")
            axes.set_yscale("log")
            plain_ticks(axes.xaxis)
            plain_ticks(axes.yaxis)
            axes.set_xlabel("megapixels")
            axes.set_ylabel(label)
            axes.grid(True)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, fontsize=7, handlelength=3
        )
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _ms(row: Measured) -> float:
    return 1e3 / row.images_per_s


def _mib(row: Measured) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / row.case.batch / 2**20
