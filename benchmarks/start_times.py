"""How long the command line takes to answer: seconds of processor and of waiting, as Markdown.

    python benchmarks/start_times.py [--runs 5] [--before OTHER_CHECKOUT] [COMMAND ...]

Each command runs in fresh processes; the least of several is what it costs when nothing else runs.
What a module costs: `python -X importtime -m zoo distill --help`.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ("--help", "--version", "distil", "list", "list recipes")
"""What is answered without a command, or nearly so; `distil` is mistyped."""
COMMANDS = (
    "list", "convert", "distill", "eval", "embed", "report", "detect", "detect-config",
    "segment-config", "bench", "bench models", "bench distill", "experiment", "experiment phi_s",
    "experiment students",
)  # fmt: skip
LIMITS = {"--help": 0.5, "--version": 0.5, "distil": 0.5, "list": 3.0}
"""Seconds that are promised; a command's own --help may take `HELP`."""
HELP = 1.5


class Cost(NamedTuple):
    """Of one process, in seconds."""

    processor: float
    """In user and system mode, with the processes that it started."""
    wall: float


def measure(words: list[str], root: Path, runs: int) -> Cost:
    """Return the least of `runs` fresh processes: `python WORDS` with the package of `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    costs = []
    for _ in range(runs):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True)
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        used = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
        costs.append(Cost(used, wall))
    return Cost(min(cost.processor for cost in costs), min(cost.wall for cost in costs))


def cases() -> dict[str, tuple[list[str], float | None]]:
    """Return what is measured: label -> words after `python`, and the seconds that are promised."""
    found: dict[str, tuple[list[str], float | None]] = {
        f"zoo {words}": (["-m", "zoo", *words.split()], LIMITS.get(words)) for words in ANSWERS
    }
    for command in COMMANDS:
        found[f"zoo {command} --help"] = (["-m", "zoo", *command.split(), "--help"], HELP)
    found["zoo eval --on segment,depth --help"] = (
        ["-m", "zoo", "eval", "--on", "segment,depth", "--help"],
        HELP,
    )
    found["import zoo"] = (["-c", "import zoo"], None)
    found["import timm, zoo"] = (["-c", "import timm, zoo"], None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("commands", nargs="*", help="only those that contain one of these words")
    parser.add_argument("--runs", type=int, default=5, help="processes of each, the least counts")
    parser.add_argument("--before", type=Path, help="another checkout, measured beside this one")
    args = parser.parse_args()
    roots = [root.resolve() for root in (args.before, ROOT) if root is not None]
    columns = [
        f"{name} {what}"
        for name in ("before", "now")[-len(roots) :]
        for what in ("CPU s", "wall s")
    ]
    print(f"| command | {' | '.join(columns)} | promised |")
    print(f"| --- |{' ---: |' * (len(columns) + 1)}")
    for label, (words, limit) in cases().items():
        if args.commands and not any(word in label for word in args.commands):
            continue
        costs = [measure(words, root, args.runs) for root in roots]
        numbers = " | ".join(f"{cost.processor:.2f} | {cost.wall:.2f}" for cost in costs)
        print(f"| `{label}` | {numbers} | {limit or '-'} |", flush=True)


if __name__ == "__main__":
    main()
