"""Measure models, print a table, keep it with its circumstances, compare two runs."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import zoo
from zoo.eval.speed.cost import name_and_options
from zoo.eval.speed.environment import environment
from zoo.eval.speed.models import (
    Case,
    Measured,
    measure,
    measure_interleaved,
    peer_of,
    ratio,
)
from zoo.files import checked, read_json
from zoo.teachers.name import unknown_name


def expand_names(names: Sequence[str]) -> list[str]:
    """Return the models that are meant: names with or without options, patterns of our own.

    Raises:
        ValueError: a name that timm does not know, or a pattern that fits nothing of ours.
    """
    found: list[str] = []
    for given in names:
        name, options = name_and_options(given)
        matching = zoo.list_models(given) if "*" in name and not options else [given]
        if not matching or not ("*" in name or timm.is_model(name)):
            raise unknown_name(name, timm.list_models(), "model")
        found += [one for one in matching if one not in found]
    return found


def measure_models(
    cases: Sequence[Case],
    *,
    rounds: int,
    peer: str,
    out: Path | None = None,
    compare: Path | None = None,
    kernels: int = 0,
    command: str | None = None,
) -> list[Measured]:
    """Measure `cases`, print them beside `peer` and an earlier run, and write the file `out`.

    `out` is a JSON file; a Markdown table and the Pareto plot are written beside it. On a CPU
    the cases take turns, on a GPU one follows the other.

    Args:
        compare: The JSON file of an earlier run.
        kernels: Name so many of each case's most expensive kernels.

    Raises:
        ValueError: `compare` is no file of this command, or no case could be measured.
    """
    earlier = None if compare is None else read_run(compare)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width to keep to
    on_gpu = torch.device(cases[0].device).type == "cuda"
    if on_gpu:
        rows = []
        for row in measure(cases, rounds=rounds, warmup=10, kernels=kernels):
            console.print(f"{len(rows) + 1}/{len(cases)} {row.case.describe()}", highlight=False)
            rows.append(row)
    else:
        rows = measure_interleaved(cases, rounds=rounds, kernels=kernels)
    head, body = table_of(rows, peer=peer, earlier=earlier[1] if earlier else None)
    run = {**environment(command), "rounds": rounds, "in_turns": not on_gpu, "peer": peer}
    title = _title(cases, run)
    shown = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in head:
        shown.add_column(column, justify="left" if column in ("model", "mode") else "right")
    for line in body:
        shown.add_row(*line)
    console.print(shown)
    for row in rows:
        if row.error:
            console.print(f"{row.case.describe()}: {row.error}", highlight=False, markup=False)
    if earlier:
        for line in differences(earlier[0], run):
            console.print(line, highlight=False, markup=False)
    if out:
        for path in write_run(out, run, rows, title, head, body):
            console.print(f"wrote {path}", highlight=False, markup=False)
    for row in rows:
        if row.kernels:
            console.print(kernel_table(row))
    if all(row.error for row in rows):
        raise ValueError(f"No case could be measured; the first one: {rows[0].error}")
    return rows


def _title(cases: Sequence[Case], run: dict[str, Any]) -> str:
    """What all rows have in common."""
    case = cases[0]
    parts = [run["machine"]["gpu"] or "GPU"] if case.device == "cuda" else ["CPU"]
    parts += [] if case.device == "cuda" else [f"{run['threads']} thread(s)"]
    parts += [case.precision, *(["channels last"] * case.channels_last)]
    parts += [f"{n} px" for n in {c.size for c in cases} if len({c.size for c in cases}) == 1]
    parts += [f"batch {n}" for n in {c.batch for c in cases} if len({c.batch for c in cases}) == 1]
    parts += [f"median of {run['rounds']} rounds{' in turns' * run['in_turns']}"]
    return f"{', '.join(parts)}; × is to {run['peer']}"


def table_of(
    rows: Sequence[Measured], *, peer: str, earlier: Sequence[Measured] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of the table; a column that would say nothing is left out."""
    several_sizes = len({row.case.size for row in rows}) > 1
    several_batches = len({row.case.batch for row in rows}) > 1
    before = {row.case: row for row in earlier or ()}
    lines: list[dict[str, str]] = []
    for row in rows:
        other = peer_of(row, rows, peer)
        faster = None if other is None else ratio(row, other)
        then = before.get(row.case)
        lines.append(
            {
                "model": row.case.model,
                "mode": row.case.mode,
                "size": str(row.case.size) if several_sizes else "-",
                "batch": str(row.case.batch) if several_batches else "-",
                "img/s": _number(row.images_per_s, 1),
                "spread": _spread(row.seconds),
                "× img/s": _number(faster, 2),
                "GMACs": _number(row.macs / 1e9, 2),
                "GMAC/s": _number(row.macs_per_s / 1e9, 1),
                "× per MAC": _number(faster and other and faster * row.macs / other.macs, 2),
                "M params": _number(row.parameters / 1e6, 2),
                "peak GiB": _number((row.peak_bytes or 0) / 2**30, 2),
                "× earlier": _number(
                    then and then.seconds and row.images_per_s / then.images_per_s, 2
                ),
            }
        )
    head = [column for column in lines[0] if any(line[column] != "-" for line in lines)]
    return head, [[line[column] for column in head] for line in lines]


def _number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if value else "-"


def _spread(seconds: list[float]) -> str:
    """Half the distance between the quartiles, in percent of the median."""
    if len(seconds) < 4:
        return "-"
    low, middle, high = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"±{50 * (high - low) / middle:.1f}%"


def kernel_table(row: Measured) -> Table:
    """Show the most expensive kernels of a case; floors are estimated from shapes."""
    on_gpu = torch.device(row.case.device).type == "cuda"
    kernels = row.kernels
    table = Table(title=f"{row.case.describe()}: where the time goes")
    table.add_column("kernel" if on_gpu else "operator", overflow="fold")
    for column in ("ms", "share", "calls", *(("launched by", "× floor", "floor is") * on_gpu)):
        table.add_column(column, justify="right")
    for kernel in kernels:
        floor = (kernel.op, _number(kernel.times_floor, 1), kernel.bound or "unknown")
        table.add_row(
            kernel.name,
            f"{1e3 * kernel.seconds:.3f}",
            f"{kernel.share:.1%}",
            f"{kernel.calls:g}",
            *(floor * on_gpu),
        )
    if any(kernel.floor_seconds for kernel in kernels):
        table.caption = "Floors are estimated from shapes: bytes at 4.3 TB/s, FLOPs at 790 TFLOP/s."
    return table


def write_run(
    out: Path,
    run: dict[str, Any],
    rows: Sequence[Measured],
    title: str,
    head: Sequence[str],
    body: Sequence[Sequence[str]],
) -> list[Path]:
    """Write the run as JSON, and beside it the table as Markdown and the Pareto plot as PNG."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**run, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")
    table = out.with_suffix(".md")
    lines = [title, "", *(f"{run['date']} · `{run['command']}`  ",), _circumstances(run), ""]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
    table.write_text("\n".join(lines) + "\n")
    written = [out, table]
    if find_spec("matplotlib") is None:
        print("No Pareto plot: matplotlib is missing (pip install 'backbone-zoo[train]').")
    elif any(row.seconds and "train" not in row.case.mode for row in rows):
        from zoo.eval.speed.pareto import draw_pareto

        plot = out.with_suffix(".png")
        plot.write_bytes(draw_pareto(rows))
        written.append(plot)
    return written


def _circumstances(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = run["machine"]
    return f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores; {versions}"


def read_run(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Read a file that `zoo bench models --out` wrote: its circumstances and its rows.

    Raises:
        ValueError: the file is something else.
    """
    try:
        run = read_json(path, most=2**28)
        rows = checked(run.pop("rows", None), list[dict[str, Any]], "its rows")
        return run, [Measured.from_json(row) for row in rows]
    except ValueError as error:
        raise ValueError(
            f"{path} is no run of `zoo bench models` ({error}); give a JSON file that its --out "
            "wrote."
        ) from None


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say in what the circumstances of two runs differ, besides their dates and commands."""
    found = []
    for name in ("threads", "versions", "machine"):
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v]
        elif old != new:
            found.append(f"{name} {old} -> {new}")
    return [f"Not like the earlier run: {what}." for what in found]
