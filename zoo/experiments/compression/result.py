"""The results of the compression experiment: tables, the verdicts of its rule, one page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.experiments.tables import markdown, print_table
from zoo.experiments.verdict import RULE, judge_gaps, spread

Rows = Sequence[Mapping[str, Any]]

CLAIMS = (
    ("heads", "contribution", "contribution_global", "inside groups beats across groups"),
    ("heads", "x", "x_global", "inside groups beats across groups, by the paper's score"),
    ("heads", "contribution", "random", "contribution beats random heads"),
    ("heads", "x", "random", "the paper's score beats random heads"),
    ("heads", "contribution", "x", "contribution beats the paper's score"),
    ("heads", "leave_one_out", "contribution", "the near-oracle beats contribution"),
    ("channels", "contribution_per_head", "x_shared", "per-head contribution beats the paper's"),
    ("channels", "contribution_per_head", "contribution_shared", "each head its own channels"),
    ("channels", "x_per_head", "x_shared", "each head its own channels, by the paper's score"),
    ("channels", "contribution_per_head", "random", "contribution beats random channels"),
    ("students", "prune_kd", "prune_ce", "the teacher beats the text"),
    ("students", "prune_kd", "random_kd", "contribution beats random units"),
    ("students", "prune_kd", "scratch_kd", "pruned beats new, with the teacher"),
    ("students", "prune_kd", "scratch_ce", "pruned and taught beats new"),
    ("students", "prune_kd", "scratch_ce_long", "pruned and taught beats new at equal compute"),
    ("masks", "wanda", "magnitude", "Wanda beats magnitude"),
    ("masks", "sparsegpt", "wanda", "SparseGPT beats Wanda"),
    ("masks", "maskllm_magnitude", "sparsegpt", "learned masks beat one shot"),
    ("masks", "maskllm_magnitude", "maskllm_none", "a prior helps learned masks"),
    ("masks", "maskllm_magnitude", "trained_weights", "learned masks beat training the weights"),
)
"""Arm, ours, theirs, and what it would mean if ours has fewer bits a byte."""


def report(rows: Rows, about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write result.json, result.md and the figure into `out`, and print the tables.

    Args:
        about: The config, the scale, the corpus, the device and the seconds of the run.

    Returns:
        The content of result.json.
    """
    verdicts = judge(rows)
    corpus = about.get("corpus", {})
    lines = [
        "# A small hybrid, cut",
        "",
        f"Bits per byte on held-out files of the Python {corpus.get('python')} standard library "
        f"({corpus.get('train_bytes', 0) / 1e6:.2f} MB to train on, SHA-256 "
        f"{str(corpus.get('train_sha256'))[:16]}; {corpus.get('held_bytes', 0) / 1e6:.2f} MB held "
        f"out, {str(corpus.get('held_sha256'))[:16]}). Scale {about['config']['scale']}, on "
        f"{about.get('device')}, {about.get('seconds', 0):.0f} s. Each seed has its own teacher, "
        "calibration rows and order of the data; mean ± deviation over seeds.",
        "",
        f"**Rule.** {RULE}",
    ]
    left = [*about.get("left_out", ()), *about.get("failed", ())]
    if left:
        lines += ["", f"**Not run, for time or an error: {len(left)} cells** ({', '.join(left[:8])}"
                  f"{', ...' if len(left) > 8 else ''})."]  # fmt: skip
    for arm in dict.fromkeys(row["arm"] for row in rows):
        head, body = _table([row for row in rows if row["arm"] == arm])
        print_table(arm, head, body)
        lines += ["", f"## {arm}", "", *markdown(head, body)]
    head, body = _verdicts(verdicts)
    if body:
        print_table("verdicts", head, body)
        lines += ["", "## Verdicts, paired by seed", "", *markdown(head, body)]
    if rows:
        from zoo.experiments.compression.figure import draw

        draw(rows, out)
        lines += ["", "![bits per byte](compression.png)"]
    result = dict(about, rule=RULE, verdicts=verdicts, rows=list(rows))
    (out / "result.md").write_text("\n".join(lines) + "\n")
    (out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(f"result  {out / 'result.md'}")
    return result


def values(rows: Rows, arm: str, way: str, share: float, point: int) -> dict[int, float]:
    """Return each seed's bits a byte at a point of the curves; `random` is the mean of its draws.

    Students have one of several rates: the best at the end.

    Args:
        point: Index into the curve: 0 before training, -1 at the end.
    """
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        mine = row["way"] == way or (way == "random" and row["way"].startswith("random_"))
        if row["arm"] != arm or not mine or row["share"] != share or (point and not row["rate"]):
            continue
        best = found.setdefault(row["seed"], {})
        before = best.get(row["way"])
        if before is None or row["curve"][-1][1] < before["curve"][-1][1]:
            best[row["way"]] = row
    return {
        seed: float(np.mean([row["curve"][point][1] for row in best.values()]))
        for seed, best in sorted(found.items())
    }


def judge(rows: Rows) -> list[dict[str, Any]]:
    """Hold each claim against the rule, at every share, before training and at the end."""
    verdicts = []
    for arm, ours, theirs, claim in CLAIMS:
        shares = dict.fromkeys(row["share"] for row in rows if row["arm"] == arm)
        for share in shares:
            for when, point in _moments(arm):
                sides = [values(rows, arm, way, share, point) for way in (ours, theirs)]
                if arm == "masks":  # what is not trained is compared as it is
                    sides = [
                        side or values(rows, arm, way, share, 0)
                        for side, way in zip(sides, (ours, theirs), strict=True)
                    ]
                seeds = sorted(set(sides[0]) & set(sides[1]))
                if not seeds:
                    continue
                gaps = [sides[0][seed] - sides[1][seed] for seed in seeds]
                verdicts.append(
                    dict(arm=arm, share=share, when=when, ours=ours, theirs=theirs, claim=claim,
                         gaps=gaps, **judge_gaps(gaps))
                )  # fmt: skip
    return verdicts


def _moments(arm: str) -> tuple[tuple[str, int], ...]:
    if arm in ("heads", "channels"):
        return (("zero-shot", 0), ("distilled", -1))
    return (("at the end", -1),)


def _table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    body = []
    keys = dict.fromkeys((row["way"], row["share"], row["rate"]) for row in rows)
    for way, share, rate in sorted(keys, key=lambda key: -key[1]):
        mine = [r for r in rows if (r["way"], r["share"], r["rate"]) == (way, share, rate)]
        ends = [row["curve"][-1][1] for row in mine] if rate else []
        body.append(
            [
                way,
                f"{share:g}",
                f"{rate:g}" if rate else "-",
                f"{mine[0]['parameters'] / 1e6:.3f} M",
                spread([row["curve"][0][1] for row in mine]),
                spread(ends),
                f"{mine[0]['curve'][-1][0] / 1e6:.3g}" if rate else "-",
                str(len(mine)),
            ]
        )
    head = ["way", "share", "rate", "parameters", "before", "after", "MB", "seeds"]
    return head, body


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["claim", "ours - theirs", "share", "when", "mean", "deviation", "seeds", "verdict"]
    return head, [
        [
            f"{v['arm']}: {v['claim']}",
            f"{v['ours']} - {v['theirs']}",
            f"{v['share']:g}",
            v["when"],
            f"{v['mean']:+.4f}",
            f"{v['deviation']:.4f}",
            str(len(v["gaps"])),
            v["verdict"],
        ]
        for v in verdicts
    ]
