"""`zoo`, but ranks die, are told to stop or lose a number at steps that `faults.json` lists.

Started as `faulty.py PLACE distill ...`; each fault happens once, which a file in PLACE remembers,
and what ranks above 0 write to disk is listed there in `written-RANK`.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zoo.train.loop as loop
from zoo.cli import main
from zoo.train.checkpoint import Writer
from zoo.train.step import Ranks

PLACE = Path(sys.argv[1])
FAULTS = json.loads((PLACE / "faults.json").read_text())
"""Each is [what, rank, step]; of `truncate` the rank is the file."""
RANK = int(os.environ.get("RANK", 0))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def due(what: str, step: int) -> bool:
    """Tell whether this rank has a fault now, and has not had it before."""
    mark = PLACE / f"{what}-{RANK}-{step}"
    if [what, RANK, step] not in FAULTS or mark.exists():
        return False
    mark.touch()
    return True


def around_update(update: Callable) -> Callable:
    """Put what happens between two steps around the optimizer's own."""

    def faulty(state: Any, *args: Any) -> None:
        for what, path, step in FAULTS:
            if what == "truncate" and step == state.step and not RANK:  # or it is halved by each
                os.truncate(path, os.path.getsize(path) // 2)  # noqa: PTH202
        if due("kill", state.step):
            os.kill(os.getpid(), signal.SIGKILL)
        if due("stop", state.step):
            os.kill(os.getpid(), signal.SIGTERM)
        if due("stop_agent", state.step):
            os.kill(os.getppid(), signal.SIGTERM)
        update(state, *args)

    return faulty


def around_write(write: Callable) -> Callable:
    """Die in the middle of a checkpoint, which a thread writes while training goes on."""

    def faulty(writer: Writer, *args: Any) -> Any:
        done = write(writer, *args)
        if due("kill_saving", writer.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return faulty


def around_losses(step: Callable) -> Callable:
    """Lose a number in the forward pass of one rank."""

    def faulty(ranks: Ranks, batch: Any, targets: Any, number: int, counts: Any) -> Any:
        total, losses, shares = step(ranks, batch, targets, number, counts)
        return total * (math.nan if due("nan", number) else 1), losses, shares

    return faulty


def list_writes(event: str, args: tuple) -> None:
    """Note what ranks above 0 write; Python tells of each (PEP 578)."""
    opens = event == "open" and isinstance(args[2], int) and args[2] & WRITING
    path = os.fspath(args[0]) if args and isinstance(args[0], (str, os.PathLike)) else ""
    if (opens or event in CHANGES) and path and not path.startswith((str(PLACE), os.devnull)):
        with (PLACE / f"written-{RANK}").open("a") as file:
            file.write(f"{event} {path}\n")


loop.update = around_update(loop.update)
Writer.write_data = around_write(Writer.write_data)
Ranks.step = around_losses(Ranks.step)
if RANK:
    sys.addaudithook(list_writes)
sys.argv[0] = "zoo"
main(sys.argv[2:])
