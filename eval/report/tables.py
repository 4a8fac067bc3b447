"""Numbers of many models as a table for a paper or a program: Markdown, LaTeX, CSV, JSON."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.eval.report.gathered import Model, gather
from zoo.eval.report.imported import Added
from zoo.eval.report.joined import headline_table
from zoo.eval.report.parts import Cell, Table
from zoo.files import written_whole

FIELDS: tuple[str, ...] = (
    "model", "measure", "data", "how", "mean", "deviation", "seeds", "size", "parameters", "macs",
)  # fmt: skip
"""The columns of CSV and the fields of JSON: a row for each number of each model."""


def write_table(
    sources: Sequence[str | Path], out: Path, added: Sequence[Added] = ()
) -> tuple[Path, list[str]]:
    """Write the numbers of runs and result files to `out`; return it, and notes for the user.

    `.md` and `.tex` hold the headline of each benchmark, the best of a column bold; `.csv` and
    `.json` hold every number, one a row.

    Raises:
        ValueError: the file ends otherwise, or as `gather`.
    """
    if out.suffix not in FORMS:
        raise ValueError(f"{out} ends in none of {', '.join(FORMS)} (tables), .html (the page).")
    models, notes = gather(sources, added)
    text = FORMS[out.suffix](models)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out, notes


def rows_of(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Return a row for each number of each model, with `FIELDS`."""
    rows = []
    for model in models:
        for measure, value in model.found.items():
            cost = model.about.get("parameters"), model.macs.get(value.size or 0)
            mean = value.mean if value.mean is not None and math.isfinite(value.mean) else None
            own = (mean, value.deviation, value.seeds, value.size, *cost)
            rows.append(dict(zip(FIELDS, (model.name, *measure, *own), strict=True)))
    return rows


def _csv(models: Sequence[Model]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(FIELDS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of(models))
    return out.getvalue()


def _json(models: Sequence[Model]) -> str:
    return json.dumps(rows_of(models), indent=1, ensure_ascii=False) + "\n"


def _headline(models: Sequence[Model]) -> Table:
    table = headline_table(models)
    if table is None:
        raise ValueError("No headline of a benchmark was measured; .csv and .json hold the rest.")
    return table


def _markdown(models: Sequence[Model]) -> str:
    table = _headline(models)

    def safe(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    def cell(one: Cell) -> str:
        return f"**{safe(one.text)}**" if one.best else safe(one.text)

    lines = [[safe(name) for name in table.head], ["---", *["---:"] * (len(table.head) - 1)]]
    lines += [[safe(row.name), *map(cell, row.cells)] for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "·": r"$\cdot$", "−": "$-$",
}  # fmt: skip


def _latex(models: Sequence[Model]) -> str:
    table = _headline(models)

    def safe(text: str) -> str:
        return "".join(ESCAPED.get(letter, letter) for letter in text)

    def cell(one: Cell) -> str:
        return rf"\textbf{{{safe(one.text)}}}" if one.best else safe(one.text)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"\toprule",
            line([safe(name) for name in table.head]),
            r"\midrule",
            *(line([safe(row.name), *map(cell, row.cells)]) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


FORMS: dict[str, Callable[[Sequence[Model]], str]] = {
    ".md": _markdown,
    ".tex": _latex,
    ".csv": _csv,
    ".json": _json,
}
"""Ending of a file -> what writes it."""
