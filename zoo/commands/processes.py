"""Several processes on this machine: `zoo` becomes torchrun."""

import os
import sys
from collections.abc import Sequence

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With 1 torchrun opens a new store when processes begin again; in the one they had, gloo finds the
addresses of the dead (torch 2.15)."""


def start(words: Sequence[str], processes: int, *, restarts: int = 0) -> None:
    """Become torchrun, with so many processes of `zoo` on this machine."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("torchrun has started this process already; leave out --processes.")
    sys.stdout.flush()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    os.environ[FRESH_STORE] = "1"
    os.execv(sys.executable, [*run, "-m", "zoo", *words])
