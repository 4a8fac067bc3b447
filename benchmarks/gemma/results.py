"""The results: one file, written whole after every part; its tables and its plot."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from zoo.files import read_json, written_whole

WAYS = {
    "pruned-kd": "pruned, KD",
    "pruned-kd-tuned": "pruned, KD from a parent tuned on the text",
    "pruned-ce": "pruned, CE",
    "pruned-ce-more": "pruned, CE, equal compute",
    "random-kd": "random, KD",
    "scratch-ce": "scratch, CE",
    "scratch-kd": "scratch, KD",
}


class Results:
    """A file of results, filled part by part."""

    def __init__(self, path: Path, about: dict[str, Any], *, resume: bool):
        self.path = path
        self.content: dict[str, Any] = dict(about=about, cells={})
        if path.is_file():
            if not resume:
                raise ValueError(f"{path} is there already; --resume goes on with it.")
            self.content = read_json(path)
            if self.content["about"] != about:
                raise ValueError(f"{path} is of {self.content['about']}, and this run of {about}.")

    def __contains__(self, part: str) -> bool:
        return part in self.content

    def __getitem__(self, part: str) -> Any:
        return self.content[part]

    def put(self, part: str, value: Any) -> None:
        """Add a part, and write all."""
        self.content[part] = value
        self.write()

    def put_cell(self, name: str, value: dict[str, Any]) -> None:
        """Add a cell, and write all."""
        self.content["cells"][name] = value
        self.write()

    def write(self) -> None:
        """Write the file whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + "\n")


def way_of(cell: dict[str, Any]) -> str:
    """Return which column a cell is in."""
    words = [cell["begin"], cell["loss"]]
    return "-".join([*words, *["more"] * cell["equal_compute"], *["tuned"] * cell.get("tuned", 0)])


def grouped(cells: dict[str, dict[str, Any]]) -> dict[tuple[float, str, str], list[dict[str, Any]]]:
    """Collect the seeds of each size, shape and way."""
    found: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for cell in cells.values():
        found.setdefault((cell["share"], cell["shape"], way_of(cell)), []).append(cell)
    return found


def spread(values: list[float]) -> str:
    """Write a mean, and half of what lies between the extremes where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def table(content: dict[str, Any]) -> str:
    """Write the perplexities on the test text as a table of Markdown."""
    cells = grouped(content["cells"])
    ways = [way for way in WAYS if any(key[2] == way for key in cells)]
    lines = [
        "| size | by | parameters (M) | before | " + " | ".join(WAYS[w] for w in ways) + " |",
        "| --- " * (4 + len(ways)) + "|",
    ]
    for share, shape in dict.fromkeys((k[0], k[1]) for k in sorted(cells, reverse=True)):
        first = next(v[0] for k, v in cells.items() if k[:2] == (share, shape))
        before = [
            c["curve"]["0"] for c in cells.get((share, shape, "pruned-kd"), []) if c["seed"] == 0
        ]
        words = [
            spread([cell["test"] for cell in found]) if (found := cells.get((share, shape, w)))
            else ""
            for w in ways
        ]  # fmt: skip
        size = f"{first['body'] / 1e6:.1f} ({first['body'] / content['dense']['body']:.0%})"
        shown = f"{before[0]:.0f}" if before else ""
        lines.append(f"| {share:.0%} | {shape} | {size} | {shown} | " + " | ".join(words) + " |")
    dense = content["dense"]
    lines.append(f"\ndense: {dense['test']:.1f} (held-out part of valid {dense['held']:.1f})")
    return "\n".join(lines)


def score_table(scores: dict[str, Any]) -> str:
    """Write what each score of units gives before any training."""
    rows = [
        f"| {name} | {found['perplexity']:.1f} | {found['kl']:.3f} |"
        for name, found in scores["by"].items()
    ]
    head = "| score | perplexity, four rows of valid | KL from the parent, held out |"
    return "\n".join([head, "| --- | --- | --- |", *rows, f"\nauto takes {scores['auto']}"])


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw the recovery curves, one panel for each size and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = grouped(content["cells"])
    panels = sorted({key[:2] for key in cells}, key=lambda p: (-p[0], p[1]))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        for number, way in enumerate(WAYS):
            for cell in cells.get((*panel, way), []):
                steps = [int(step) for step in cell["curve"]]
                label = WAYS[way] if cell["seed"] == 0 else None
                ax.plot(
                    [s + 1 for s in steps], list(cell["curve"].values()), color=f"C{number}",
                    label=label, linewidth=1,
                )  # fmt: skip
        ax.axhline(content["dense"]["held"], color="black", linestyle=":", linewidth=1)
        ax.set(
            xscale="log", yscale="log", xlabel="steps + 1", title=f"{panel[0]:.0%} by {panel[1]}"
        )
    axes[0][0].set_ylabel("perplexity, held-out text")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
