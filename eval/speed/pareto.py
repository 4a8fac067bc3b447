"""Draw speed against arithmetic, size and published accuracy."""

import io
import statistics
from collections.abc import Sequence
from typing import Any

import zoo
from zoo.eval.report.figures import FAINT, INK, STUDENT_COLOUR, STYLE, plain_ticks
from zoo.eval.speed.cost import name_and_options
from zoo.eval.speed.models import Measured, words

_FASTERVIT = "FasterViT (2306.06189)"
_MAMBAVISION = "MambaVision (2407.08083)"

PUBLISHED_TOP1: dict[tuple[str, int], tuple[float, str]] = {
    ("fastervit_0", 224): (82.1, _FASTERVIT),
    ("fastervit_1", 224): (83.2, _FASTERVIT),
    ("fastervit_2", 224): (84.2, _FASTERVIT),
    ("fastervit_3", 224): (84.9, _FASTERVIT),
    ("fastervit_4", 224): (85.4, _FASTERVIT),
    ("fastervit_5", 224): (85.6, _FASTERVIT),
    ("fastervit_6", 224): (85.8, _FASTERVIT),
    ("fastervit_4_w14", 224): (86.6, f"{_FASTERVIT}, ImageNet-21k"),
    ("fastervit_4_w24", 384): (87.6, f"{_FASTERVIT}, ImageNet-21k"),
    ("fastervit_4_w32", 512): (87.8, f"{_FASTERVIT}, ImageNet-21k"),
    ("fastervit_4_w48", 768): (87.9, f"{_FASTERVIT}, ImageNet-21k"),
    ("mambavision_t", 224): (82.3, _MAMBAVISION),
    ("mambavision_t2", 224): (82.7, _MAMBAVISION),
    ("mambavision_s", 224): (83.3, _MAMBAVISION),
    ("mambavision_b", 224): (84.2, _MAMBAVISION),
    ("mambavision_l", 224): (85.0, _MAMBAVISION),
    ("mambavision_l2", 224): (85.3, _MAMBAVISION),
    ("mambavision_l2", 512): (87.3, f"{_MAMBAVISION}, ImageNet-21k"),
    ("mambavision_l3", 256): (87.3, f"{_MAMBAVISION}, ImageNet-21k"),
    ("mambavision_l3", 512): (88.1, f"{_MAMBAVISION}, ImageNet-21k"),
    ("swin_tiny_patch4_window7_224", 224): (81.3, "Swin (2103.14030)"),
    ("convnext_tiny", 224): (82.1, "ConvNeXt (2201.03545)"),
}
"""ImageNet-1k top-1 in per cent by (model, size), from the papers and their authors' tables.

These are published, not measured here, and belong to the released weights."""


def published_top1(row: Measured) -> float | None:
    """Return the published accuracy of a row's model at its size, in per cent, if there is one."""
    name, _ = name_and_options(row.case.model)
    return PUBLISHED_TOP1.get((name, row.case.size), (None,))[0]


def fastest(rows: Sequence[Measured]) -> list[Measured]:
    """Return the fastest inference row of each model and size, in their first order."""
    best: dict[tuple[str, int], Measured] = {}
    for row in rows:
        key = row.case.model, row.case.size
        if not row.seconds or "train" in words(row.case.mode):
            continue
        if key not in best or row.images_per_s > best[key].images_per_s:
            best[key] = row
    return list(best.values())


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both numbers, sorted by the first."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept[::-1]


def draw_pareto(rows: Sequence[Measured]) -> bytes:
    """Draw images per second against multiply-adds, parameters and published top-1, as a PNG.

    Each model is in its fastest inference mode. The line joins the models that no other model
    beats in both numbers: with more work, more parameters or a better accuracy at a higher speed.

    Raises:
        ValueError: no row holds a speed of inference.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = fastest(rows)
    if not chosen:
        raise ValueError("There is no inference row to draw; measure a mode without train.")
    own = set(zoo.list_models())
    panels = (
        ("GMACs per image", [row.macs / 1e9 for row in chosen], True),
        ("parameters (M)", [row.parameters / 1e6 for row in chosen], True),
        ("published ImageNet-1k top-1 (%)", [published_top1(row) for row in chosen], False),
    )
    panels = [panel for panel in panels if any(x is not None for x in panel[1])]
    with matplotlib.rc_context(STYLE):
        width = 0.6 + 4.4 * len(panels)
        figure = Figure(figsize=(width, 4.4), dpi=160)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.75 / width, 0.12, 1 - 0.15 / width, 0.89, wspace=0.17)
        device = {"cpu": "CPU", "cuda": "GPU"}.get(chosen[0].case.device, chosen[0].case.device)
        figure.suptitle(f"Inference on one {device}, fastest mode of each model", weight="bold")
        for i, (label, values, log) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            shown = [(x, row) for x, row in zip(values, chosen, strict=True) if x is not None]
            _panel(axes, label, shown, own, log=log)
            axes.set_ylabel("" if i else "images/s")
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(
    axes: Any, label: str, shown: list[tuple[float, Measured]], own: set[str], *, log: bool
) -> None:
    line = frontier([(x, row.images_per_s) for x, row in shown])
    if line:
        axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1, zorder=1)
    for x, row in shown:
        colour = STUDENT_COLOUR if _is_ours(row, own) else FAINT
        axes.scatter(x, row.images_per_s, color=colour, s=28, zorder=2)
    if log:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xlabel(label)
    axes.margins(0.2)
    axes.grid(True)
    _label(axes, shown, own)


def _is_ours(row: Measured, own: set[str]) -> bool:
    return name_and_options(row.case.model)[0] in own


def _label(axes: Any, shown: list[tuple[float, Measured]], own: set[str]) -> None:
    usual = statistics.mode(row.case.size for _, row in shown)
    points = []
    for at, row in shown:
        text = row.case.model.partition("_patch")[0]
        text += f" @{row.case.size}" if row.case.size != usual else ""
        points.append((at, row.images_per_s, text, INK if _is_ours(row, own) else FAINT))
    label_points(axes, points)


def label_points(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the text of each point (x, y, text, colour) beside it, where there is room."""
    axes.autoscale_view()  # otherwise the positions of the points are unknown until they are drawn
    edges = axes.bbox
    positions = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    scale = axes.figure.dpi / 72
    dot = 4 * scale
    taken = [(x - dot, y - dot, x + dot, y + dot) for x, y in positions]
    for (x, y), (at, height, text, colour) in zip(positions, points, strict=True):
        wide, high = 4.6 * scale * len(text), 9 * scale  # about the size of letters of 8 points
        places = [
            (right, up) for up in (4, -10, 14, -20, 24, -30) for right in (5, -5 - wide / scale)
        ]
        for right, up in places:
            left, low = x + right * scale, y + up * scale
            box = (left, low, left + wide, low + high)
            inside = edges.x0 < left and left + wide < edges.x1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            right, up = places[0]
            box = (x + right * scale, y + up * scale, x + right * scale + wide, y + high)
        taken.append(box)
        axes.annotate(
            text,
            (at, height),
            xytext=(right, up),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
