"""Tables for a terminal or a log, and as Markdown."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table; in a file or a pipe it is not narrowed to the width of a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=240, highlight=False)
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in body:
        table.add_row(*map(escape, row))
    console.print(table)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]
