"""The tables of a run in the terminal: what the page shows of held-out images, without pictures."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zoo.eval.report.page import benchmark_table, likeness_table
from zoo.eval.report.parts import Table
from zoo.eval.report.run_folder import read_run

PIPED = 120
"""Columns, where the output is no terminal."""


def print_tables(run_dir: Path) -> None:
    """Print how like its teachers each student is, and how good the features of each model are."""
    run = read_run(run_dir)
    console = Console(width=None if sys.stdout.isatty() else PIPED, highlight=False)
    for table in (likeness_table(run), benchmark_table(run)):
        if table:
            console.print(_drawn(table))


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(*table.head[:1])
    for name in table.head[1:]:
        drawn.add_column(name, justify="right")
    for row in table.rows:
        cells = [Text(cell.text, "bold" if cell.best else "") for cell in row.cells]
        drawn.add_row(Text(row.name, "bold" if row.strong else ""), *cells)
    return drawn
