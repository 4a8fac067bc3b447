"""`zoo` on ranks, with transformers' norms, routers and scans in float64: it fixes them to float32.

Started as `on_float64.py COMMANDS`, a JSON file with a list of command lines; one process group
serves all of them.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.mixtral.modeling_mixtral as mixtral
import transformers.models.nemotron_h.modeling_nemotron_h as nemotron_h

from zoo.cli import main
from zoo.train.mesh import PATIENCE, under_torchrun


class Wide:
    """torch, whose float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def widen(assign: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let transformers compute in float64 throughout."""
    for module in (mixtral, nemotron_h):
        assign(module, "torch", Wide())
    assign(torch.Tensor, "float", torch.Tensor.double)


if __name__ == "__main__":
    widen()
    sys.argv, commands = ["zoo"], json.loads(Path(sys.argv[1]).read_text())
    if under_torchrun():
        dist.init_process_group("gloo", timeout=PATIENCE)
    for words in commands:
        main(words)
    if under_torchrun():
        dist.barrier()
        dist.destroy_process_group()
