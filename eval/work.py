"""The folder in which a benchmark trains, from which the training can be resumed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.train.interrupt import Interrupted


@contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """Yield `work`, or a temporary folder if it is `None`.

    The temporary folder is removed, except after an error, whose message may name files in it.

    Raises:
        Interrupted: a signal came; the message says what is kept.
    """
    if work is not None:
        yield work
        return
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    try:
        yield folder
    except Interrupted as stop:
        shutil.rmtree(folder)
        message = "Stopped. Without --out FILE.jsonl nothing of the training is kept."
        raise Interrupted(stop.exit_code - 128, message) from None
    shutil.rmtree(folder)
