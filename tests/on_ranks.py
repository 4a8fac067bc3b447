"""One rank of some processes: runs each `case_*` of a file, and tells the largest difference.

    python tests/on_ranks.py CASES RANK WORLD FOLDER DEVICE

The processes talk through gloo, on DEVICE cuda through NCCL. A case takes the process group and
returns a number: how far the ranks together are from one process. The largest of all
ranks' is written to FOLDER/found.json.
"""

import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def refused(calls) -> None:
    """Hold that each call of `(call, words)` is refused with these words."""
    for call, words in calls:
        try:
            call()
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


def main(cases: str, rank: int, world: int, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_device(device)
    store = dist.FileStore(str(folder / "store"), world)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    found = {}
    for name, case in runpy.run_path(cases).items():
        if name.startswith("case_"):
            torch.manual_seed(0)
            difference = torch.tensor(float(case(group)), dtype=torch.float64)
            dist.all_reduce(difference, dist.ReduceOp.MAX)
            found[name.removeprefix("case_")] = difference.item()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    store.set(f"done {rank}", "")  # who leaves early tears connections that others still read from
    store.wait([f"done {other}" for other in range(world)])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
