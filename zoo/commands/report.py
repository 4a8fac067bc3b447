"""`zoo report`: one page about a run, or about many."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, finished or not, and result files of zoo eval."""
    out: Path | None = None
    """Where the page of several goes; report.html here, unless given."""


def main(args: list[str]) -> None:
    """Write RUN/report.html of one run, or join runs and result files into one page.

    Examples: zoo report runs/mine      zoo report runs/a runs/b results.jsonl --out all.html
    """
    from zoo.eval.report.joined import build_joined
    from zoo.eval.report.page import build_report

    asked = parse(ReportArgs, args, "report", main.__doc__ or "")
    if not asked.runs:
        raise ValueError("Name at least one run's folder or result file of zoo eval.")
    if len(asked.runs) == 1 and asked.runs[0].suffix != ".jsonl" and asked.out is None:
        print(build_report(asked.runs[0]).resolve())
    else:
        print(build_joined(asked.runs, asked.out or Path("report.html")).resolve())
