"""Start a `zoo` command on one process or several, and read what its run wrote."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.train.checkpoint import checkpoints, read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PORT = "29571"


@dataclass(frozen=True)
class Machine:
    """Where the runs are, and for how long one may last."""

    gpus: int
    device: str
    work: Path
    limit: float = 240.0

    def run(self, name: str, words: Sequence[str], *, processes: int, nodes: int = 1) -> "Done":
        """Carry a command out; `nodes` agents share the processes, as machines would.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        out = self.work / name
        if "--resume" not in words:
            shutil.rmtree(out, ignore_errors=True)
            words = [*words, "--out", str(out)]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes // nodes}"]
        where = [f"--nnodes={nodes}", "--master-addr=localhost", f"--master-port={PORT}"]
        held = self.work / f"{name}-memory"
        rest = ["-m", "benchmarks.several_gpus.child", str(held), *words, "--device", self.device]
        agents = []
        for node in range(nodes):
            env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path[1:]]))
            if nodes > 1:
                env["CUDA_VISIBLE_DEVICES"] = ",".join(
                    map(str, range(node * processes // nodes, (node + 1) * processes // nodes))
                )
            log = (self.work / f"{name}-{node}.log").open("w")
            alone = processes == 1
            begin = [sys.executable, *(() if alone else (*launcher, *where, f"--node-rank={node}"))]
            agents.append(subprocess.Popen([*begin, *rest], env=env, stdout=log, stderr=log,
                                           cwd=ROOT, start_new_session=True))  # fmt: skip
        try:
            codes = [agent.wait(self.limit) for agent in agents]
        except subprocess.TimeoutExpired:
            codes = [f"over {self.limit:.0f} s"]
        finally:
            for agent in agents:
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGKILL)
        if any(codes):
            said = (self.work / f"{name}-0.log").read_text()[-1500:]
            raise RuntimeError(f"{name}: {codes}; {said}")
        memory = [json.loads(Path(f"{held}.{rank}.json").read_text())["peak_gb"]
                  for rank in range(processes)]  # fmt: skip
        return Done(out, memory)


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
