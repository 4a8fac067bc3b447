"""One self-contained page about one run."""

from zoo.eval.report.page import build_report

__all__ = ["build_report"]
