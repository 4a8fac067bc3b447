"""Plots of the joined page as inline SVG: they follow the page's colours and say more on hover."""

import colorsys
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from zoo.eval.report.figures import short_number
from zoo.eval.speed.pareto import frontier

WIDTH, HEIGHT = 340, 270
LEFT, RIGHT, TOP, BELOW = 50, 14, 30, 40
APART = 42
"""Between two labels of the lower axis, at least."""
DOT = 9.0
"""Radius of a dot, which holds the number of its model."""


class Dot(NamedTuple):
    """One model in a plot."""

    cost: float
    quality: float
    deviation: float | None
    number: int
    name: str
    colour: str


def colours(count: int) -> list[str]:
    """Return colours that differ in hue, and neighbours in luminance too.

    All stand out from a white and from a dark page by a contrast of 3 or more (WCAG 2.2, 1.4.11),
    as does the number on them (`ink_on`) by 4.5 (1.4.3).
    """
    return [_with_luminance(i / max(count, 1), (DEEP, LIGHT)[i % 2]) for i in range(count)]


DEEP, LIGHT = 0.14, 0.29
"""Relative luminances of the colours of models."""


def _with_luminance(hue: float, luminance: float) -> str:
    """Return the colour of a hue whose relative luminance is given, by bisection of lightness."""
    low, high, found = 0.0, 1.0, "#000000"
    for _ in range(20):
        middle = (low + high) / 2
        parts = colorsys.hls_to_rgb(hue, middle, 0.7)
        found = "#" + "".join(f"{round(255 * x):02x}" for x in parts)
        low, high = (middle, high) if luminance_of(found) < luminance else (low, middle)
    return found


def luminance_of(colour: str) -> float:
    """Return the relative luminance of a colour as #rrggbb (WCAG 2.2): 0 is black, 1 white."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def ink_on(colour: str) -> str:
    """Return the colour of letters on a coloured ground: white or nearly black."""
    return "#ffffff" if luminance_of(colour) < (DEEP + LIGHT) / 2 else "#101114"


def quality(
    title: str, cost: str, measure: str, dots: Sequence[Dot], *, more_is_better: bool
) -> str:
    """Return a plot of quality over a cost on a log axis, with the Pareto frontier as a line.

    Bars are one standard deviation over seeds. Dots that would cover each other are moved apart,
    with a line to where they belong.
    """
    low, high = (f(d.cost for d in dots) for f in (min, max))
    left, right = math.log(low) - 0.12, math.log(high) + 0.12
    ends = [d.quality + sign * (d.deviation or 0) for d in dots for sign in (-1, 1)]
    margin = 0.12 * (max(ends) - min(ends)) or 1.0
    bottom, top = min(ends) - margin, max(ends) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - left) / (right - left)
        up = (y - bottom) / (top - bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BELOW - up * (HEIGHT - TOP - BELOW)

    parts = [_axes(title, cost, measure, (math.exp(left), math.exp(right)), (bottom, top), place)]
    sign = 1 if more_is_better else -1
    best = frontier([(sign * d.cost, d.quality) for d in dots])
    line = " ".join("{:.1f},{:.1f}".format(*place(sign * x, y)) for x, y in best)
    parts.append(f'<polyline class="front" points="{line}"/>')
    where = apart([place(d.cost, d.quality) for d in dots])
    for dot, (x, y) in zip(dots, where, strict=True):
        parts.append(_dot(dot, (x, y), place, cost, measure))
    summary = "; ".join(f"{d.name} {_number(d)} at {short_number(d.cost)}" for d in dots)
    label = escape(f"{title} against {cost}: {summary}")
    return (
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


class Ring(NamedTuple):
    """One model in a radar."""

    shares: Sequence[float | None]
    """Of the perfect score on each axis; `None` where the model has no number."""
    number: int
    name: str
    colour: str
    shown: bool = True
    """Drawn from the beginning, not only once its box in the legend is ticked."""


ACROSS, DOWN, RIM = 560, 380, 130
"""Size of a radar, and the radius of a perfect score."""


def radar(axes: Sequence[Sequence[str]], rings: Sequence[Ring], *, rim: float = 1.0) -> str:
    """Return each model as a polygon over the axes, 0 in the middle and `rim` at the rim.

    Axes on which a model has no number are skipped. A model is `#radar-NUMBER`.

    Args:
        axes: The lines of text at the end of each axis, from the top clockwise.
    """
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]

    def place(angle: float, share: float) -> tuple[float, float]:
        x, y = ACROSS / 2 + RIM * share * math.sin(angle), DOWN / 2 - RIM * share * math.cos(angle)
        return round(x, 1), round(y, 1)

    def corners(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in points)

    parts = []
    for share in (0.25, 0.5, 0.75, 1.0):
        ring = corners([place(angle, share) for angle in angles])
        parts.append(f'<polygon class="rim" points="{ring}"/>')
    for angle, lines in zip(angles, axes, strict=True):
        (x, y), (left, top) = place(angle, 1), place(angle, 1.08)
        parts.append(f'<line class="grid" x1="{ACROSS / 2}" y1="{DOWN / 2}" x2="{x}" y2="{y}"/>')
        side = "x" if abs(math.sin(angle)) < 0.1 else "s" if math.sin(angle) > 0 else "e"
        rise = 0.4 - 1.2 * (len(lines) - 1) * (1 + math.cos(angle)) / 2  # away from the rim
        rows = "".join(
            f'<tspan x="{left}" dy="{rise if i == 0 else 1.2:.2f}em">{escape(_short(line, 26))}'
            "</tspan>"
            for i, line in enumerate(lines)
        )
        parts.append(f'<text class="{side}" x="{left}" y="{top}">{rows}</text>')
    for ring in rings:
        known = [(a, s) for a, s in zip(angles, ring.shares, strict=True) if s is not None]
        told = "\n".join(
            f"{' '.join(lines)}: {share:.1%}"
            for lines, share in zip(axes, ring.shares, strict=True)
            if share is not None
        )
        off = "" if ring.shown else ' class="off"'
        dots = "".join(
            '<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*place(a, s / rim), ring.colour)
            for a, s in known
        )
        parts.append(
            f'<g id="radar-{ring.number}"{off}><title>{escape(ring.name)}\n{escape(told)}</title>'
            f'<polygon points="{corners([place(a, s / rim) for a, s in known])}" '
            f'fill="{ring.colour}" stroke="{ring.colour}"/>{dots}</g>'
        )
    told = "; ".join(
        f"{r.name} {', '.join(f'{s:.0%}' if s is not None else '–' for s in r.shares)}"
        for r in rings
    )
    label = escape(f"Radar of {', '.join(' '.join(lines) for lines in axes)}: {told}")
    return (
        f'<svg class="chart radar" role="img" aria-label="{label}" viewBox="0 0 {ACROSS} {DOWN}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _number(dot: Dot) -> str:
    about = "" if dot.deviation is None else f" ± {short_number(dot.deviation)}"
    return short_number(dot.quality) + about


def _dot(dot: Dot, at: tuple[float, float], place, cost: str, measure: str) -> str:
    x, y = place(dot.cost, dot.quality)
    parts = [
        f"<title>{escape(dot.name)}\n{escape(measure)}: {_number(dot)}\n"
        f"{escape(cost)}: {short_number(dot.cost)}</title>"
    ]
    if dot.deviation:
        ends = [place(dot.cost, dot.quality + sign * dot.deviation)[1] for sign in (-1, 1)]
        parts.append(
            f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
        )
    if math.dist((x, y), at) > 1:
        parts.append(
            f'<line class="bar" x1="{x:.1f}" y1="{y:.1f}" x2="{at[0]:.1f}" y2="{at[1]:.1f}"/>'
        )
    parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{DOT:g}" fill="{dot.colour}"/>')
    parts.append(
        f'<text class="n" style="fill:{ink_on(dot.colour)}" x="{at[0]:.1f}" '
        f'y="{at[1] + 3.5:.1f}">{dot.number}</text>'
    )
    return f"<g>{''.join(parts)}</g>"


def apart(places: Sequence[tuple[float, float]], rounds: int = 60) -> list[tuple[float, float]]:
    """Move points that are nearer than two radii apart, a little at a time."""
    found = [list(place) for place in places]
    for _ in range(rounds):
        still = True
        for i in range(len(found)):
            for j in range(i):
                dx, dy = found[i][0] - found[j][0], found[i][1] - found[j][1]
                gap = math.hypot(dx, dy)
                lacking = 2 * DOT + 1 - gap
                if lacking <= 0:
                    continue
                still = False
                angle = math.atan2(dy, dx) if gap > 0.01 else 2.4 * i  # equal points: any way
                for one, way in ((i, 0.5), (j, -0.5)):
                    found[one][0] += way * lacking * math.cos(angle)
                    found[one][1] += way * lacking * math.sin(angle)
                    found[one][0] = min(max(found[one][0], LEFT + DOT), WIDTH - DOT)
                    found[one][1] = min(max(found[one][1], TOP), HEIGHT - BELOW)
        if still:
            break
    return [(x, y) for x, y in found]


def _axes(
    title: str,
    cost: str,
    measure: str,
    across: tuple[float, float],
    up: tuple[float, float],
    place,
) -> str:
    parts = [f'<text class="t" x="8" y="17">{escape(_short(title, 44))}</text>']
    last = -math.inf
    for x in log_ticks(*across):
        at = place(x, up[0])[0]
        if at - last < APART:
            continue
        last = at
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" '
                     f'y2="{HEIGHT - BELOW}"/>')  # fmt: skip
        text = f"{x:,.10g}"
        parts.append(f'<text class="x" x="{at:.1f}" y="{HEIGHT - BELOW + 14}">{text}</text>')
    for y in ticks(*up):
        at = place(across[0], y)[1]
        parts.append(f'<line class="grid" y1="{at:.1f}" y2="{at:.1f}" x1="{LEFT}" '
                     f'x2="{WIDTH - RIGHT}"/>')  # fmt: skip
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{at + 3.5:.1f}">{y:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="x" x="{middle}" y="{HEIGHT - 8}">{escape(cost)}</text>')
    turned = f"rotate(-90 12 {HEIGHT / 2})"
    words = escape(_short(measure, 30))
    parts.append(f'<text class="x" x="12" y="{HEIGHT / 2}" transform="{turned}">{words}</text>')
    return "".join(parts)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two others, at most so many."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    for factor in (0.1, 0.2, 0.5, 1, 2, 5, 10):
        size = step * factor
        first, last = math.ceil(low / size), math.floor(high / size)
        if last - first + 1 <= most:
            return [round(n * size, 10) for n in range(first, last + 1)]
    return []


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two positive ones, evenly spread over their logarithms."""
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(found) <= most:
            return found
    return found[:: max(1, len(found) // most)]
