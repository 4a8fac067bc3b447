"""Make the pictures of README.md and docs/ again: `make pictures`.

    python -m benchmarks.pictures                          # all; the maps are the quickstart's
    python -m benchmarks.pictures --run runs/mine          # the maps of another run
    python -m benchmarks.pictures --only speed evaluation  # without a run

`maps.png` colours the held-out crops of photographs that `zoo distill quickstart` left, as
`zoo report RUN --out maps.png` does; the run is made where it is not there, in minutes on two CPU
cores. The photographs ship in scikit-image and scikit-learn. `speed.png` and `evaluation.png` draw
what stands in benchmarks/results.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.cli import main as zoo
from zoo.eval.report.figures import ARM_COLOURS, FAINT, INK, STUDENT_COLOUR, STYLE, plain_ticks
from zoo.eval.report.picture import MOST_BYTES, write_picture
from zoo.files import written_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
COMPRESSED = RESULTS / "vision-compression-h200-2026-12-02.json"
MEASURED = RESULTS / "downstream-h200-2026-11-23"
CUTS: Mapping[str, tuple[str, str]] = {
    "both": ("width and depth", STUDENT_COLOUR),
    "depth": ("depth", ARM_COLOURS[3]),
    "width": ("width", ARM_COLOURS[2]),
    "torch_pruning": ("Torch-Pruning", ARM_COLOURS[1]),
}
"""Cut -> its name and colour."""


def maps(out: Path, run: Path) -> None:
    """Draw the feature maps of a run; the quickstart is carried out where it is not there."""
    if not (run / "maps.npz").is_file():
        zoo(["distill", "quickstart", "--out", str(run)])
    write_picture([run], out)


def speed(out: Path) -> None:
    """Draw images a second against kNN of two networks at half their FLOPs, cut and distilled."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = json.loads(COMPRESSED.read_text())
    panels = (("lite2", "EfficientNet-Lite2"), ("vit", "ViT-Tiny"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.1), dpi=110)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(0.065, 0.13, 0.985, 0.9, wspace=0.16)
        for i, (network, title) in enumerate(panels):
            axes = figure.add_subplot(1, 2, i + 1)
            _speed_panel(axes, found, network)
            axes.set_title(f"{title} at half its FLOPs", loc="left", weight="bold", size=11.5)
            axes.set_ylabel("" if i else "kNN, Caltech-99 (%)")
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    with written_whole(out) as temporary:
        temporary.write_bytes(data.getvalue())


def _speed_panel(axes: Any, found: Mapping[str, Any], network: str) -> None:
    rate, parent = found["speed"][network]["best"], found["networks"][network]["knn"]
    rates = [row["best"] for name, row in found["speed"].items() if name.startswith(network)]
    axes.set_xscale("log")
    axes.set_xlim(0.93 * min(rates), 1.07 * max(rates))
    axes.scatter(rate, parent, marker="*", s=150, color=INK, zorder=3)
    _label(axes, "as it was", rate, parent, INK)
    named = list[tuple[float, float]]()
    for cut, (name, colour) in CUTS.items():
        row = f"{network}-{cut}"
        if row not in found["speed"]:
            continue
        rate = found["speed"][row]["best"]
        before = found["networks"][row]["knn"]
        after = found["cells"][f"{row}-others"]["knn"]
        axes.annotate(
            "", (rate, after), (rate, before),
            arrowprops=dict(arrowstyle="-|>", color=colour, shrinkA=5, shrinkB=5), zorder=1,
        )  # fmt: skip
        axes.scatter(rate, before, s=46, facecolors="white", edgecolors=colour, zorder=2)
        axes.scatter(rate, after, s=46, color=colour, zorder=2)
        beside = any(abs(x / rate - 1) < 0.15 and abs(y - after) < 2 for x, y in named)
        _label(axes, name, rate, after, colour, lower=beside)
        named.append((rate, after))
    plain_ticks(axes.xaxis)
    axes.margins(y=0.12)
    axes.grid(True)
    axes.set_xlabel("images per second, one H200, bfloat16")
    how = "hollow: only cut; full: then distilled"
    axes.text(0.98, 0.03, how, transform=axes.transAxes, ha="right", size=8.5, color=FAINT)


def _label(axes: Any, name: str, x: float, y: float, colour: str, *, lower: bool = False) -> None:
    low, high = axes.get_xlim()
    left = x > (low * high) ** 0.5  # in the right half of a log axis there is more room on the left
    axes.annotate(
        name, (x, y), xytext=(-9 if left else 9, -16 if lower else 3),
        textcoords="offset points", size=9, ha="right" if left else "left", color=colour,
    )  # fmt: skip


def evaluation(out: Path) -> None:
    """Draw five backbones' kNN against their speed, as `zoo report *.jsonl --out` does."""
    write_picture(sorted(MEASURED.glob("*.jsonl")), out)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the pictures that are asked for, and say their sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ("maps", "speed", "evaluation")
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        file = args.out / f"{name}.png"
        if name == "maps":
            maps(file, args.run)
        else:
            {"speed": speed, "evaluation": evaluation}[name](file)
        size = file.stat().st_size
        print(f"{file}: {size / 1000:.0f} kB")
        assert size <= MOST_BYTES, f"{file} has more than {MOST_BYTES} bytes"


if __name__ == "__main__":
    main()
