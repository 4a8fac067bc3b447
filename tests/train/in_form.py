"""`zoo distill` on ranks whose compiled code takes over after a few steps.

Started as `in_form.py COMMANDS DEVICE`, a JSON file with command lines by name; one process group,
of gloo, serves all of them, on DEVICE cuda as well: so two ranks may share a GPU. NAME.RANK.json
says at which step a rank took over, and what was compiled beside it. On DEVICE cpu the form is that
of a GPU, and the compiler changes nothing; nothing compiles beside, but rank 1 is ready two steps
after rank 0.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zoo.cli import main
from zoo.commands.distill import run
from zoo.compiled_blocks import compile_blocks
from zoo.train.distill import compiling, speed, worth
from zoo.train.distill.config import Distill
from zoo.train.distill.speed import Speed, choose
from zoo.train.mesh import PATIENCE, rank

FOUND: dict[str, Any] = {}


class Told(compiling.TakeOver):
    """Tells when it takes over."""

    def __call__(self) -> bool:
        answer = super().__call__()
        if answer:
            FOUND["step"] = self.state.step
        return answer


class Awaited(compiling.Compiling):
    """Waited for by the step that asks first: a run of a few steps would be over sooner."""

    def __init__(self, run: Path, config: Distill, parts: list[str], *say: Callable):
        FOUND["parts"] = parts
        super().__init__(run, config, parts, *say)

    def done(self) -> bool:
        for process in self._left.values():
            process.wait()
        return super().done()


class Later:
    """What has nothing to compile, and says that it has for some steps."""

    def __init__(self, run: Path, config: Distill, parts: list[str], *say: Callable):
        FOUND["parts"], self.left = parts, 2 * rank()

    def done(self) -> bool:
        self.left -= 1
        return self.left < 0

    def stop(self) -> None:
        pass


def as_on_a_gpu(config: Distill, _: torch.device, *, nested: bool) -> Speed:
    known = config if config.speed == "plain" else replace(config, precision="auto")
    return choose(known, torch.device("cuda"), nested=nested)


def without_a_gpu() -> None:
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **how: plain(self, **{"backend": "eager", **how})
    speed.compile_blocks = partial(compile_blocks, backend="eager")
    run.choose, compiling.Compiling = as_on_a_gpu, Later


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    os.environ["LOCAL_RANK"] = "0"  # all share the one GPU
    dist.init_process_group("gloo", timeout=PATIENCE)
    worth.SETTLING, worth.TIMED, worth.COLD, worth.WARM = 1, 1, 0.0, 0.0
    compiling.TakeOver, compiling.Compiling = Told, Awaited
    if sys.argv[2] == "cpu":
        without_a_gpu()
    for name, words in commands.items():
        FOUND.clear()
        sys.argv = ["zoo", *words]
        with Path(f"{name}.{rank()}.err").open("w") as err, redirect_stderr(err):
            main(words)
        Path(f"{name}.{rank()}.json").write_text(json.dumps(FOUND))
    dist.barrier()
    dist.destroy_process_group()
