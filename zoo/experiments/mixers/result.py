"""The results of the mixers experiment: tables, the study's order, one page."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.experiments.mixers.figure import draw
from zoo.experiments.tables import markdown, print_table
from zoo.experiments.verdict import RULE, judge_gaps, spread
from zoo.files import written_whole

NAN = float("nan")
Rows = Sequence[Mapping[str, Any]]
BITS, BOOKS, STRINGS = "bits a byte", "phonebook/inside/exact", "copying/inside/exact"
SHOWN = tuple(
    f"{task}/{part}"
    for task in ("phonebook", "copying")
    for part in ("inside/exact", "inside/token", "beyond/exact")
)
CLAIMS = (
    ("hybrid", "attention", BITS, "the hybrid beats attention on text"),
    ("mamba2", "attention", BITS, "Mamba-2 is no worse than attention on text"),
    ("attention", "mamba2", BOOKS, "attention beats Mamba-2 at phone books"),
    ("hybrid", "mamba2", BOOKS, "the hybrid beats Mamba-2 at phone books"),
    ("hybrid", "attention", BOOKS, "the hybrid is no worse than attention at phone books"),
    ("attention", "mamba2", STRINGS, "attention beats Mamba-2 at copying"),
    ("hybrid", "mamba2", STRINGS, "the hybrid beats Mamba-2 at copying"),
    ("hyena", "attention", BITS, "StripedHyena 2 beats attention on text (2503.01868)"),
    ("hyena", "mamba2", BOOKS, "StripedHyena 2 beats Mamba-2 at phone books"),
)
"""Ours, theirs, the measure, and what it would mean if ours is better: the order of 2406.07887,
and two of StripedHyena 2, which that study does not have."""


def report(rows: Rows, about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write result.json and result.md into `out`, and print the tables.

    Args:
        about: The config, the scale, the corpus, the device and the seconds of the run.

    Returns:
        The content of result.json.
    """
    verdicts, config, corpus = judge(rows), about["config"], about["corpus"]
    scale = about["scale"]
    lines = [
        "# What mixes tokens",
        "",
        f"Bits per byte on held-out files of the Python {corpus['python']} standard library "
        f"({corpus['train_bytes'] / 1e6:.2f} MB to train on, SHA-256 "
        f"{corpus['train_sha256'][:16]}; {corpus['held_bytes'] / 1e6:.2f} MB held out, "
        f"{corpus['held_sha256'][:16]}); phone books and copying by `zoo eval`'s benchmarks, per "
        "cent of the answers that are right as a whole (exact), and of their bytes (token; a guess "
        "has 31 of phone books, whose space and hyphen are always there, and 4 of copying). "
        f"{config['tasks']:.0%} of the rows that are learnt are such drills, with up to "
        f"{scale['drilled'][0]} entries and {scale['drilled'][1]} letters (inside; what is larger "
        "is beyond); no name that is measured stands in one that is learnt. Scale "
        f"{config['scale']}, on {about['device']}, torch {about['torch']}. "
        "Mean ± deviation over seeds.",
        "",
        f"**Rule.** {RULE}",
    ]
    if left := [*about.get("left_out", ()), *about.get("failed", ())]:
        lines += ["", f"**Not run, for time or an error:** {', '.join(left)}."]
    for title, table in (
        ("Text and recall", _towers), ("By size of the task", _sizes),
        ("Tokens a second behind a context", _speeds), ("The study's order", _verdicts),
    ):  # fmt: skip
        head, body = table(verdicts if table is _verdicts else rows)
        if body:
            print_table(title, head, body)
            lines += ["", f"## {title}", "", *markdown(head, body)]
    if any(not row["context"] for row in rows):
        draw(rows, out)
        lines += ["", "![bits a byte and recall by bytes learnt](curves.png)"]
    result = dict(about, rule=RULE, verdicts=verdicts, rows=list(rows))
    for name, text in (
        ("result.md", "\n".join(lines)), ("result.json", json.dumps(result, indent=2, default=str))
    ):  # fmt: skip
        with written_whole(out / name) as temporary:
            temporary.write_text(text + "\n")
    print(f"result  {out / 'result.md'}")
    return result


def values(rows: Rows, tower: str, measure: str) -> dict[int, float]:
    """Return each seed's number of a tower."""
    return {
        row["seed"]: row["curve"][-1][1] if measure == BITS else row["recalled"][measure]
        for row in rows
        if row["tower"] == tower and not row["context"]
    }


def judge(rows: Rows) -> list[dict[str, Any]]:
    """Hold each claim against the rule; a gap below 0 is for it."""
    verdicts = []
    for ours, theirs, measure, claim in CLAIMS:
        sides = [values(rows, tower, measure) for tower in (ours, theirs)]
        seeds, sign = sorted(set(sides[0]) & set(sides[1])), 1 if measure == BITS else -1
        gaps = [sign * (sides[0][seed] - sides[1][seed]) for seed in seeds]
        if gaps:
            verdicts.append(
                dict(ours=ours, theirs=theirs, measure=measure, claim=claim, gaps=gaps,
                     **judge_gaps(gaps))
            )  # fmt: skip
    return verdicts


def _of(rows: Rows, tower: str, number: Callable[[Mapping[str, Any]], float], digits: int) -> str:
    mine = [r for r in rows if r["tower"] == tower and not r["context"]]
    return spread([number(row) for row in sorted(mine, key=lambda row: row["seed"])], digits)


def _towers(rows: Rows) -> tuple[list[str], list[list[str]]]:
    trained = [row for row in rows if not row["context"]]
    body = []
    for tower in dict.fromkeys(row["tower"] for row in trained):
        mine = [row for row in trained if row["tower"] == tower]
        body.append(
            [
                tower,
                f"{mine[0]['parameters'] / 1e6:.2f} M",
                f"{mine[0]['curve'][-1][0] / 1e6:.3g}",
                _of(rows, tower, lambda row: row["curve"][-1][1], 4),
                *(
                    _of(rows, tower, lambda row, name=name: row["recalled"].get(name, NAN), 1)
                    for name in SHOWN
                ),
                _of(rows, tower, lambda row: row["train_seconds"], 1),
                str(len(mine)),
            ]
        )
    head = ["tower", "parameters", "MB", BITS, *SHOWN, "seconds to train", "seeds"]
    return head, body


def _sizes(rows: Rows) -> tuple[list[str], list[list[str]]]:
    trained = [row for row in rows if not row["context"]]
    if not trained:
        return [], []
    towers = list(dict.fromkeys(row["tower"] for row in trained))
    names = [n for n in trained[0]["recalled"] if re.search(r"/\d+/(exact|token)$", n)]
    body = [
        [name, *(_of(rows, t, lambda row, name=name: row["recalled"][name], 1) for t in towers)]
        for name in names
    ]
    return ["per cent right", *towers], body


def _speeds(rows: Rows) -> tuple[list[str], list[list[str]]]:
    timed = {(row["tower"], row["context"]): row for row in rows if row["context"]}
    towers = list(dict.fromkeys(tower for tower, _ in timed))
    contexts = sorted({context for _, context in timed})
    body = []
    for context in contexts:
        line = [f"{context:,}"]
        for tower in towers:
            row = timed.get((tower, context))
            line.append(
                f"{row['tokens_a_second']:,.0f} ({row['cache_bytes'] / 1e6:,.1f} MB)"
                if row
                else "-"
            )
        body.append(line)
    return ["context", *(f"{tower} (its state)" for tower in towers)], body


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["claim", "measure", "mean (below 0: so it is)", "deviation", "seeds", "verdict"]
    return head, [
        [
            v["claim"],
            f"{v['ours']} - {v['theirs']}, {v['measure']}",
            f"{v['mean']:+.4f}",
            f"{v['deviation']:.4f}",
            str(len(v["gaps"])),
            v["verdict"],
        ]
        for v in verdicts
    ]
