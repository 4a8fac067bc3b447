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
BLIND, BEST = "one trajectory for every scene", "the best of each scene"
"""Between the total of the one and that of the other lies what can be gained by looking."""
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
    head, body = table(rows, controls)
    print_table("Held-out scenes", head, body)
    lines = ["# Rules as teachers", "", f"**Rule.** {RULE}", "", *markdown(head, body)]
    verdicts = {}
    said = [
        f"{arm}: {spread(gains(rows, arm, controls), 1)} % of what looking can gain."
        for arm in arms_of(rows)
    ]
    if len(said) > 1:
        for name in ("collides", "leaves_the_road", "total"):
            pairs = paired(rows, name)
            sign = -1 if name == "total" else 1  # below 0 the rules are better
            found = verdicts[name] = judge_gaps([sign * (ours - theirs) for ours, theirs in pairs])
            ratio = np.mean([o for o, _ in pairs]) / max(np.mean([t for _, t in pairs]), 1e-9)
            said.append(f"{MEASURES[name]}: {ratio:.2f} of imitation's, {found['verdict']}.")
    for sentence in said:
        lines += ["", sentence]
    taken = {arm: next(row["shown"] for row in rows if row["arm"] == arm) for arm in arms_of(rows)}
    lines += ["", f"On {about['device']}, torch {about['torch']}. The first scenes, a row each for "
              f"{' and '.join(taken)} (first seed): ![scenes](scenes.png)"]  # fmt: skip
    draw(taken, scenes, out / "scenes.png")
    (out / "result.md").write_text("\n".join(lines) + "\n")
    result = dict(about, rule=RULE, verdicts=verdicts, controls=dict(controls), rows=list(rows))
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(*said, f"result  {out / 'result.md'}", sep="\n")


def table(
    rows: Rows, controls: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table, each arm beside itself in other scenes."""
    head = ["what chooses", *MEASURES.values(), "of what looking gains, %", "seeds"]
    body = []
    for arm in arms_of(rows):
        own = [row for row in rows if row["arm"] == arm]
        elsewhere = [dict(row, **row["shuffled"]) for row in own]
        for name, found in ((arm, own), (f"{arm}, in the scene before", elsewhere)):
            measured = (spread(values(found, arm, measure), 1) for measure in MEASURES)
            gained = spread(gains(found, arm, controls), 1)
            body.append([name, *measured, gained, str(len(found))])
    for what, found in controls.items():
        gained = f"{share(found['total'], controls):.1f}"
        body.append([what, *(f"{found[name]:.1f}" for name in MEASURES), gained, ""])
    return head, body


def arms_of(rows: Rows) -> list[str]:
    """Return the arms in the order in which they came."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def share(total: float, controls: Mapping[str, Mapping[str, float]]) -> float:
    """Return how far a total lies from the blind control's to the best, in per cent."""
    blind, best = (controls[name]["total"] for name in (BLIND, BEST))
    return 100 * (total - blind) / max(best - blind, 1e-9)


def gains(rows: Rows, arm: str, controls: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Return what looking gains an arm, seed by seed, of what it can gain."""
    return [share(total, controls) for total in values(rows, arm, "total")]


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
