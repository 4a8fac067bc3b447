"""The results of the PHI-S experiment: table, paired intervals, figure, verdict, one page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.experiments.intervals import SeedDifference, compare_seeds
from zoo.experiments.phi_s.figure import Rows, teachers_of
from zoo.experiments.tables import markdown, print_table

FEWEST = 3
"""Fewest seeds for an interval to mean anything."""
WORSE = ("none", "hybrid")
"""Arms that PHI-S must beat in minimum fidelity on every seed; the verdict ignores the others."""


def report(rows: Rows, about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write result.json, result.md and the figure into `out`; print the tables and the verdict.

    Args:
        about: The config, the steps, the device and the seconds of the run.

    Returns:
        The content of result.json.
    """
    lines = [
        "# PHI-S: three teachers, one student",
        "",
        f"{about.get('steps')} steps of batch {about['config']['batch']} for each student, "
        f"{about['config']['size']} px, on {about.get('device')}; {about['seconds']:.0f} s in all. "
        "The teachers were trained in the run; the scales of their features (overall deviations "
        "0.03, 1.35, 5.5; log-normal gains; offsets) are imposed, the directions their own. "
        "Fidelity is the teacher's variance over the student's error on held-out images; "
        "1 is what the teacher's mean would get. ± is the standard deviation over seeds.",
    ]
    planned = about["config"]["steps"]
    if about.get("steps") != planned:
        lines += ["", f"**Reduced: {about.get('steps')} steps instead of {planned}.**"]
    pairs: dict[str, Any] = {}
    for name in dict.fromkeys(row["set"] for row in rows if row["set"] != "teachers"):
        chosen = [row for row in rows if row["set"] == name]
        head, body = _table(chosen)
        print_table(f"{name}: mean ± deviation over {_seeds(chosen)} seeds", head, body)
        lines += ["", f"## {name}: {_seeds(chosen)} seeds", "", *markdown(head, body)]
        pairs[name] = compare(chosen)
        head, body = _paired_table(pairs[name])
        print_table(f"{name}: PHI-S against each other arm, paired", head, body)
        lines += [
            "",
            "PHI-S against each other arm, paired by seed, 95 % intervals over the seeds by "
            "Student's t (per cent for fidelities, points for kNN and linear):",
            "",
            *markdown(head, body),
        ]
    result = dict(
        about,
        rows=list(rows),
        verdict=verdict(rows),
        rotation=rotation(pairs),
        paired={s: {a: _plain(m) for a, m in arms.items()} for s, arms in pairs.items()},
    )
    lines += ["", f"**{result['verdict']['told']}**", "", result["rotation"] or ""]
    if pairs:
        from zoo.experiments.phi_s.figure import draw

        draw(rows, pairs, out)
        lines += ["", "![fidelities and paired differences](phi_s.png)"]
    (out / "result.md").write_text("\n".join(lines).rstrip() + "\n")
    (out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    for line in (result["verdict"]["told"], result["rotation"], f"result  {out / 'result.md'}"):
        if line:
            print(line)
    return result


def compare(rows: Rows) -> dict[str, dict[str, SeedDifference]]:
    """Pair PHI-S with each other arm of a set: arm -> measure -> difference."""
    measures = [k for k in rows[0] if k.split("/")[0] in ("fidelity", "knn", "linear")]
    found: dict[str, dict[str, SeedDifference]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        if arm == "phi_s":
            continue
        found[arm] = {
            m: compare_seeds(
                *zip(*_by_seed(rows, arm, m), strict=True), ratio=m.startswith("fidelity/")
            )
            for m in measures
        }
    return found


def _by_seed(rows: Rows, arm: str, measure: str) -> list[tuple[float, float]]:
    values = {(row["arm"], row["seed"]): row[measure] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return [(values["phi_s", seed], values[arm, seed]) for seed in seeds]


def verdict(rows: Rows) -> dict[str, Any]:
    """Decide whether PHI-S has a larger minimum fidelity than the arms `WORSE` on every seed.

    Returns:
        `passed`, and the verdict as text, `told`.
    """
    chosen = [row for row in rows if row["set"] == "arms"]
    lost, count = [], 0
    for arm in WORSE:
        if not any(row["arm"] == arm for row in chosen):
            continue
        for seed, (ours, theirs) in enumerate(_by_seed(chosen, arm, "fidelity/min")):
            count += 1
            if not ours > theirs:
                lost.append(f"{arm} on seed {seed} ({ours:.3g} against {theirs:.3g})")
    if lost:
        text = f"FAILED: PHI-S has no larger minimum fidelity than {'; '.join(lost)}."
    elif count:
        text = f"PHI-S has a larger minimum fidelity than none and hybrid: {count} of {count}."
    else:
        text = "Nothing to compare PHI-S with: neither none nor hybrid was trained."
    return dict(passed=not lost, told=text)


def rotation(pairs: Mapping[str, Mapping[str, Mapping[str, SeedDifference]]]) -> str | None:
    """Return a sentence about the effect of PHI-S's rotation; `None` if it was not trained."""
    name = next((s for s in ("rotation", "arms") if "alpha_only" in pairs.get(s, {})), None)
    if name is None:
        return None
    found = pairs[name]["alpha_only"]["fidelity/geomean"]
    result = "the interval excludes zero" if found.separated else "not separable from zero"
    if found.count < FEWEST:
        result = "too few to say"
    return (
        "The rotation alone (phi_s over alpha_only, geometric-mean fidelity): "
        f"{found.describe('%')} over {found.count} seeds: {result}."
    )


def _table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    names = teachers_of(rows)
    fields = [f"fidelity/{name}" for name in (*names, "geomean", "min")]
    fields += [k for k in rows[0] if k.split("/")[0] in ("knn", "linear")]
    head = [
        "arm",
        *(f.removeprefix("fidelity/") for f in fields),
        "error by channel",
        "img/s together",
    ]
    body = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        low = min(row[f"error/{n}/low"] for row in mine for n in names)
        high = max(row[f"error/{n}/high"] for row in mine for n in names)
        speed = float(np.mean([row["img_s"] for row in mine]))
        cells = [_spread([row[f] for row in mine], f.startswith("fidelity/")) for f in fields]
        body.append([arm, *cells, f"{low:.2g} to {high:.2g}", f"{speed:,.0f}"])
    return head, body


def _spread(values: Sequence[float], scientific: bool) -> str:
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    digits = 1 if not scientific else 2 if abs(mean) < 100 else 0
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _paired_table(
    pairs: Mapping[str, Mapping[str, SeedDifference]],
) -> tuple[list[str], list[list[str]]]:
    chosen = [
        m
        for m in next(iter(pairs.values()), {})
        if m.split("/")[0] in ("knn", "linear") or m in ("fidelity/min", "fidelity/geomean")
    ]
    body = [
        [arm, *(p[m].describe("%" if m.startswith("fidelity/") else "") for m in chosen)]
        for arm, p in pairs.items()
    ]
    return ["PHI-S against", *chosen], body


def _plain(measures: Mapping[str, SeedDifference]) -> dict[str, Any]:
    return {m: dict(vars(p), separated=p.separated) for m, p in measures.items()}


def _seeds(rows: Rows) -> int:
    return len({row["seed"] for row in rows})
