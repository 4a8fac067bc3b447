"""Start a `zoo` command on one process or several, and read what its run wrote."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.train.checkpoint import checkpoints, read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PORT = "29571"
LEAVING = 10.0
"""Seconds in which processes end when they are told to."""


@dataclass(frozen=True)
class Machine:
    """Where the runs are, and for how long one may last."""

    gpus: int
    device: str
    work: Path
    limit: float = 240.0

    def run(
        self,
        name: str,
        words: Sequence[str],
        *,
        processes: int,
        nodes: int = 1,
        torchrun: bool = False,
    ) -> "Done":
        """Carry a command of `zoo` out; `nodes` agents share the processes, as machines would.

        Args:
            torchrun: Start one process by it too, which cut weights need.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        out = self.work / name
        if "--resume" not in words:
            shutil.rmtree(out, ignore_errors=True)
            words = [*words, "--out", str(out)]
        held = self.work / f"{name}-memory"
        rest = ["-m", "benchmarks.several_gpus.child", str(held), *words, "--device", self.device]
        self.launch(
            name, rest, processes=processes, nodes=nodes, torchrun=torchrun or processes > 1
        )
        memory = [json.loads(Path(f"{held}.{rank}.json").read_text())["peak_gb"]
                  for rank in range(processes)]  # fmt: skip
        return Done(out, memory)

    def launch(
        self,
        name: str,
        rest: Sequence[str],
        *,
        processes: int,
        nodes: int = 1,
        torchrun: bool = True,
    ) -> None:
        """Carry out what stands behind `python`, on processes.

        Raises:
            RuntimeError: it failed, or took too long; nothing of it is left.
        """
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes // nodes}"]
        where = [f"--nnodes={nodes}", "--master-addr=localhost", f"--master-port={PORT}"]
        agents = list[subprocess.Popen]()
        logs = [self.work / f"{name}-{node}.log" for node in range(nodes)]
        for node, log in enumerate(logs):
            env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path[1:]]))
            if nodes > 1:
                env["CUDA_VISIBLE_DEVICES"] = ",".join(
                    map(str, range(node * processes // nodes, (node + 1) * processes // nodes))
                )
            begin = [sys.executable, *((*launcher, *where, f"--node-rank={node}") * torchrun)]
            with log.open("w") as file:
                agents.append(subprocess.Popen([*begin, *rest], env=env, stdout=file,
                                               stderr=file, cwd=ROOT))  # fmt: skip
        try:
            codes = wait_for(agents, self.limit)
        finally:
            for agent in agents:
                end(agent)
        if codes is None or any(codes):
            said = "".join(log.read_text()[-1500:] for log in logs)
            raise RuntimeError(f"{name}: {codes or f'over {self.limit:.0f} s'}; {said}")


def wait_for(agents: Sequence[subprocess.Popen], seconds: float) -> list[int] | None:
    """Return the exit codes when all have ended, or one has failed and the others had their time.

    Returns:
        None if they go on.
    """
    last, failed = time.monotonic() + seconds, False
    while time.monotonic() < last:
        codes = [agent.poll() for agent in agents]
        if None not in codes:
            return [code for code in codes if code is not None]
        if any(codes) and not failed:  # the others soon see it
            last, failed = min(last, time.monotonic() + LEAVING), True
        time.sleep(0.2)
    return [agent.poll() or 0 for agent in agents] if failed else None


def end(agent: subprocess.Popen) -> None:
    """End a process with all that it started; torchrun puts each worker in a session of its own."""
    if agent.poll() is not None:
        return
    family = [agent.pid, *descendants(agent.pid)]
    agent.terminate()
    with suppress(subprocess.TimeoutExpired):
        agent.wait(LEAVING)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def descendants(pid: int) -> list[int]:
    """List the processes below one (Linux)."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [p for child in map(int, found) for p in (child, *descendants(child))]


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    out: Path
    peak_gb: list[float]
    """Of each process."""

    def rates(self, unit: str = "img") -> float:
        """Return the median rate of the second half of the run, a second."""
        lines = (self.out / "timing.jsonl").read_text().splitlines()
        found = [json.loads(line)[f"{unit}_s"] for line in lines]
        return statistics.median(found[len(found) // 2 :])

    def losses(self) -> list[float]:
        """Return the loss of each step that was logged."""
        rows = map(json.loads, (self.out / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["kind"] == "train"]

    def weights(self, number: int = -1) -> dict[str, Tensor]:
        """Return the model's weights in a checkpoint, as float64."""
        read = read_checkpoint(checkpoints(self.out / "checkpoints")[number])["model"]
        return {
            k: v.double()
            for k, v in read.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }


def distance(ours: Done, theirs: Done) -> float:
    """Return how far two runs ended from each other, as a share of the way that one of them went.

    The way is that from its first checkpoint to its last.
    """
    mine, other, start = ours.weights(), theirs.weights(), theirs.weights(0)
    gap = sum(float((mine[name] - x).square().sum()) for name, x in other.items())
    way = sum(float((start[name] - x).square().sum()) for name, x in other.items())
    return (gap / way) ** 0.5


def report(path: Path, found: dict[str, Any]) -> None:
    """Write what is known so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def machine_facts(device: str) -> dict[str, str]:
    """Say where this was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return dict(device=name, torch=torch.__version__)
