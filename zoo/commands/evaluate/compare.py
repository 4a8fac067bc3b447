"""`zoo eval --compare`: two models, or result files, image by image."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from zoo.commands.evaluate.run import evaluate
from zoo.eval.paired import compare, pair
from zoo.eval.results import SUFFIX, Record, read
from zoo.eval.subject import EvalRequest
from zoo.train.mesh import is_first


def results_of(side: str) -> tuple[Path, str] | None:
    """Return the result file and the target (or no name) that a side of a comparison names, if
    that is what it names.
    """
    head, found, wanted = side.partition(f"{SUFFIX}:")  # a target may have a colon of its own
    file = Path(f"{head}{SUFFIX}" if found else side)
    return (file, wanted) if file.is_file() and file.suffix == SUFFIX else None


def records_of(side: str, request: EvalRequest) -> list[Record]:
    """Return one side's results: from its result file (`FILE.jsonl` or `FILE.jsonl:TARGET`), or
    measured now.

    Raises:
        ValueError: the file holds several targets and none was named.
    """
    named = results_of(side)
    if named is None:
        return evaluate(side, request, show=False)
    file, wanted = named
    records = read(file)
    targets = sorted({record.target for record in records})
    if wanted and wanted not in targets:
        raise ValueError(f"{file} has no result of {wanted!r}; it has {', '.join(targets)}.")
    if not wanted and len(targets) > 1:
        raise ValueError(
            f"{file} holds results of {', '.join(targets)}; name one: {file}:{targets[0]}."
        )
    return [record for record in records if record.target == (wanted or targets[0])]


def compare_targets(first: str, second: str, request: EvalRequest) -> None:
    """Print the differences of two models with paired bootstrap intervals over images.

    Raises:
        ValueError: the two share no benchmark with the same data and settings.
    """
    sides = records_of(first, request), records_of(second, request)
    if not is_first():
        return
    rows = compare(*sides)
    table = Table(title=f"{second} against {first}")
    for column in ("measure", "first", "second", "difference", "95 % interval"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for row in rows:
        table.add_row(*row.describe(), style="bold" if row.separated else None)
    table.caption = "Paired bootstrap over images; what the interval separates from 0 is bold."
    Console().print(table)
    for line in pair(*sides).left_out(first, second):
        print(f"not compared: {line}")
