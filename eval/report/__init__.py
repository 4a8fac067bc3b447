"""One self-contained page about one run; `zoo.eval.report.joined` makes one about many."""

from zoo.eval.report.page import build_report

__all__ = ["build_report"]
