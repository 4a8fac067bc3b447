"""The results of the planning experiment: a table, the rule, and scenes with what was taken."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.experiments.tables import markdown, print_table
from zoo.experiments.verdict import RULE, judge_gaps, spread
from zoo.teachers.planning import METRES, vocabulary

Rows = Sequence[Mapping[str, Any]]
MEASURES = {
    "collides": "hits something, %",
    "leaves_the_road": "leaves the road, %",
    "progress": "progress, % of the best",
    "total": "the rules' total, %",
}
SCALE = 4
"""Pixels of the picture for one of a scene."""


def report(
    rows: Rows,
    about: dict[str, Any],
    controls: Mapping[str, Mapping[str, float]],
    scenes: np.ndarray,
    out: Path,
) -> None:
    """Write result.json, result.md and scenes.png into `out`, and print the table.

    Args:
        controls: What choices have that no student makes, by what chooses.
        scenes: The first of those that were measured on, [N, 3, size, size].
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    head = ["what chooses", *MEASURES.values(), "seeds"]
    body = [
        [arm, *(spread(values(rows, arm, name), 1) for name in MEASURES),
         str(len(values(rows, arm, "total")))]
        for arm in arms
    ]  # fmt: skip
    for what, found in controls.items():
        body.append([what, *(f"{found[name]:.1f}" for name in MEASURES), ""])
    print_table("Held-out scenes", head, body)
    lines = ["# Rules as teachers", "", f"**Rule.** {RULE}", "", *markdown(head, body)]
    verdicts, said = {}, []
    if len(arms) > 1:
        for name in ("collides", "leaves_the_road"):
            pairs = paired(rows, name)
            found = verdicts[name] = judge_gaps([ours - theirs for ours, theirs in pairs])
            ratio = np.mean([o for o, _ in pairs]) / max(np.mean([t for _, t in pairs]), 1e-9)
            said.append(f"{MEASURES[name]}: {ratio:.2f} of imitation's, {found['verdict']}.")
            lines += ["", said[-1]]
    lines += ["", f"On {about['device']}, torch {about['torch']}. The first scenes, a row for each "
              "arm (its first seed): ![scenes](scenes.png)"]  # fmt: skip
    draw({row["arm"]: row["shown"] for row in reversed(rows)}, scenes, out / "scenes.png")
    (out / "result.md").write_text("\n".join(lines) + "\n")
    result = dict(about, rule=RULE, verdicts=verdicts, controls=dict(controls), rows=list(rows))
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(*said, f"result  {out / 'result.md'}", sep="\n")


def values(rows: Rows, arm: str, name: str) -> list[float]:
    """Return a measure of an arm, seed by seed."""
    return [row[name] for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm]


def paired(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Return a measure with rules and by imitation alone, of the seeds that have both."""
    by = {(row["arm"], row["seed"]): row[name] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return [
        (by["rules", seed], by["imitation", seed])
        for seed in seeds
        if ("rules", seed) in by and ("imitation", seed) in by
    ]


def draw(taken: Mapping[str, Sequence[int]], scenes: np.ndarray, path: Path) -> None:
    """Draw scenes in a row for each arm, the trajectory that it takes in white."""
    points = vocabulary().points.numpy()
    rows = []
    for numbers in taken.values():
        drawn = []
        for scene, number in zip(scenes, numbers, strict=False):
            picture = np.kron(scene.transpose(1, 2, 0), np.ones((SCALE, SCALE, 1)))
            side = len(picture)
            for x, y in points[number]:
                row, column = int(side * (1 - y / METRES)), int(side * (x / METRES + 0.5))
                picture[max(0, row - 3) : row + 3, max(0, column - 3) : column + 3] = 1.0
            drawn.append(picture)
        rows.append(np.concatenate(drawn[:6], axis=1))
    Image.fromarray(np.round(255 * np.concatenate(rows)).astype(np.uint8)).save(path)
