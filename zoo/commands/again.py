"""A command that torchrun or SLURM starts again goes on with the run that it has begun."""

import os
import sys
from pathlib import Path


def started_again(resume: Path | None, folder: Path) -> bool:
    """Tell whether this command is started again, and what it has begun is in the folder.

    One rank that knows is enough: the agent of a node that replaces a lost one has restarted
    nothing yet, and the others do not count the restart with which they let it in. For that the
    run itself remembers which launch began it. Every rank calls this.

    Args:
        resume: The run that the words go on with; then there is nothing to tell.
    """
    counts = (os.environ.get(f"{who}_RESTART_COUNT", "0") for who in ("TORCHELASTIC", "SLURM"))
    counted = any(count != "0" for count in counts)
    if not counted and "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    from zoo.commands.distill.stages import has_begun
    from zoo.train.mesh import any_rank, by_first, launch
    from zoo.train.run import Run

    told = any_rank(counted or resume is not None)

    def begun() -> bool:
        runs = (Run(path) for path in (folder, *folder.glob("*-*")))  # stages have their own
        return has_begun(folder) and (told or launch() in [run.launch() for run in runs])

    again = by_first(begun) and resume is None
    if again:
        print(f"zoo: started again, so the run in {folder} goes on.", file=sys.stderr)
    return again
