"""The plots of the reports, as PNG bytes, on white: in dark mode the page inverts them."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

INK, FAINT, GRID = "#1d1f23", "#6b7078", "#e3e4e8"
STUDENT_COLOUR = "#2459d3"
ARM_COLOURS = ("#a9adb6", "#d97706", "#0d9488", "#9333ea", "#be123c", "#4d7c0f")
"""The first is the colour of the untrained student."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "text.parse_math": False,
}
WIDTH, DPI = 4.3, 160
LOWEST = 1e-3
"""Smaller fidelities are drawn at this value."""

Curve = tuple[str, Sequence[float], Sequence[float], str]
"""Label, steps, values, colour."""


@contextmanager
def canvas(
    title: str, height: float, *, left: float, below: float = 0.32
) -> Iterator[tuple[Any, list[bytes]]]:
    """Yield the axes of a new figure and a list; afterwards the list holds the figure as a PNG.

    Args:
        height: Height of the figure, in inches.
        left: Margin on the left, in inches. The margins are given because matplotlib's automatic
            layout draws everything twice.
        below: Margin below, in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done: list[bytes] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=left / WIDTH, right=0.97, bottom=below / height, top=1 - 0.34 / height
        )
        figure.text(0.02, 1 - 0.06 / height, shorten(title, 38), va="top", size=11.5, weight="bold")
        yield figure.add_subplot(), done
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
        done.append(out.getvalue())


def curves(title: str, lines: Sequence[Curve], *, log: bool = True, ylabel: str = "") -> bytes:
    """Draw values over steps as a PNG; long series are faint, with their running mean on top.

    Args:
        log: Use a log axis for the values, without those that are not positive.
    """
    with canvas(title, 2.7, left=0.78 if ylabel else 0.6, below=0.52) as (axes, done):
        for label, steps, values, colour in lines:
            x, y = np.asarray(steps, float), np.asarray(values, float)
            if log:
                x, y = x[y > 0], y[y > 0]  # a log axis cannot show zero
            smooth = _running_mean(y)
            if smooth is not y:
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.25)
            marker = "o" if len(x) < 2 else None
            axes.plot(x, smooth, color=colour, linewidth=1.8, label=label, marker=marker)
        if log:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        if not log:
            axes.set_ylim(bottom=0, top=1.15 * max(axes.get_ylim()[1], 1e-9))
        if len(lines) > 1:
            axes.legend(labelcolor=FAINT)
    return done[0]


def _running_mean(y: np.ndarray) -> np.ndarray:
    """Return the mean over a fiftieth of the run; a short series is returned as it is."""
    width = len(y) // 50
    if width < 2:
        return y
    padded = np.pad(y, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def plain_ticks(axis: Any) -> None:
    """Label a log axis with a few plain numbers (0.2, 1, 50) instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    class Handful(LogLocator):
        """Within one decade a LogLocator has up to nine ticks, whose labels would overlap."""

        def tick_values(self, vmin: float, vmax: float) -> Any:
            for places in (super(), LogLocator()):  # 1, 2, 5, 10, ...; then only decades
                ticks = places.tick_values(vmin, vmax)
                if 1 < sum(vmin <= tick <= vmax for tick in ticks) < 7:
                    return ticks
            return MaxNLocator(4).tick_values(vmin, vmax)

    axis.set_major_locator(Handful(subs=(1.0, 2.0, 5.0), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def fidelity_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return limits of an axis that has room for all finite values, the line at 1, and labels."""
    finite = [max(v, LOWEST) for v in values if math.isfinite(v)]
    low, high = min([*finite, 0.9]), max([*finite, 1.5])
    share = 0.2  # of the width, on each side where a bar can have its number
    sides = 2 if low < 0.9 else 1
    room = math.exp(math.log(high / low) * share / (1 - sides * share))
    return low / (room if sides == 2 else 1), high * room


def fidelity_bars(
    title: str, bars: Sequence[tuple[str, float, str]], limits: tuple[float, float]
) -> bytes:
    """Draw a bar for each arm on a log axis, from the line at 1; higher is better.

    Args:
        bars: Label, fidelity (may be infinite or NaN) and colour, from top to bottom.
    """
    low, high = limits
    names = [shorten(name, 24) for name, _, _ in bars]
    left = 0.2 + 0.088 * max(map(len, names))  # 0.088 inches are about the width of a letter
    with canvas(title, 0.76 + 0.36 * len(bars), left=left) as (axes, done):
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        for row, (_, value, colour) in enumerate(bars):
            end = min(max(value, low), high) if not math.isnan(value) else 1.0
            axes.barh(row, end - 1, left=1, height=0.62, color=colour)
            side = "left" if end >= 1 else "right"
            inside = end in (high, low)
            axes.annotate(
                short_number(value),
                (1 if inside else end, row),
                xytext=(4 if side == "left" else -4, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                color="white" if inside else INK,
                fontsize=10,
            )
        axes.axvline(1, color=INK, linewidth=1.1)
        axes.set_yticks(range(len(bars)), names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        plain_ticks(axes.xaxis)
    return done[0]


def short_number(value: float | None) -> str:
    """Return a number as text with three significant digits, as in the reports."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}".replace("-", "−")
    return f"{value:.2g}".replace("-", "−")


def shorten(text: str, most: int) -> str:
    """Replace the middle of a text longer than `most` letters by an ellipsis."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def tile(pixels: np.ndarray, side: int = 168) -> bytes:
    """Return an image or a map [H W 3] as a PNG whose longer side is about `side` pixels.

    Small maps are enlarged by whole factors, so that a token stays a square of one colour.
    """
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    longer = max(image.size)
    if longer <= side:
        times = max(1, side // longer)
        size = (image.width * times, image.height * times)
        image = image.resize(size, Image.Resampling.NEAREST)
    else:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
