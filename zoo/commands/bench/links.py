"""`zoo bench links`: how fast the ranks of a job reach each other; `zoo plan` reads it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from zoo.commands.parse import parse
from zoo.train.ranges import COUNT, check_ranges


@dataclass(frozen=True, kw_only=True)
class LinksArgs:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    most: Annotated[int, COUNT] = 1024
    """MiB of the largest message; the smallest has one."""
    rounds: Annotated[int, COUNT] = 10
    """Times that each is sent."""
    out: Path | None = None
    """Write the figures to this JSON file, for `zoo plan --links`."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Measure all-reduce, all-gather, reduce-scatter and all-to-all between GPUs.

    Example: torchrun --nproc-per-node 8 -m zoo bench links --out links.json
    then: zoo plan c_radio_v4 --gpus 64 --links links.json

    Ranks of one node are measured together, and those of different nodes each with its counterpart.
    """
    args = parse(LinksArgs, argv, "bench links", main.__doc__ or "")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            "zoo bench links measures the way between processes, and here is one. "
            "Start it as torchrun --nproc-per-node 8 -m zoo bench links."
        )
    import torch
    from rich.console import Console

    from zoo.commands.bench.collectives import figures, measure_links, table
    from zoo.files import save_whole
    from zoo.train.device import device_of
    from zoo.train.mesh import is_first, ranks

    device = device_of(args.device)
    with ranks(device):  # the command has joined them; a caller from Python may not have
        rows = measure_links(device, most=args.most, rounds=args.rounds)
        if not is_first():
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        found = figures(rows, name)
        Console().print(table(rows))
        print(found["how"])
        for where in ("within", "between"):
            if where in found:
                hop = 1e6 * found[f"hop_{where}"]
                print(f"{where} nodes {found[where]:.4g} GB/s, {hop:.3g} us a hop")
        if args.out:
            text = json.dumps(found | dict(rows=[row._asdict() for row in rows]), indent=1)
            save_whole(text, args.out, lambda text, path: path.write_text(text + "\n"))
            print(f"written to {args.out}; zoo plan RECIPE --links {args.out} reads it")
