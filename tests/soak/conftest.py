"""Runs on several processes with faults in them: started, watched, and compared with their twins.

`make soak` gives them SOAK_STEPS=300, `make test-long` some dozens. SOAK_SEED draws the steps and
ranks of faults, and is printed.
"""

import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from zoo.data.embedded import EMBEDDED
from zoo.data.plan import Plan
from zoo.train.checkpoint import checkpoints, damage, read_checkpoint, split
from zoo.train.distill.config import Distill
from zoo.train.distill.setup import open_data
from zoo.train.run import Run

ROOT = Path(__file__).parents[2]
STEPS = int(os.environ.get("SOAK_STEPS", "36"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
SAVES = max(2, STEPS // 12)
"""Steps from one checkpoint to the next."""
RUN = shlex.split(
    "distill --teachers rule:colour@64 rule:edges@64,summary=0 --student eradio_nano "
    "--student-options dim=8 in_dim=8 neck_dim=32 depths=(1,1,1,1) num_heads=(1,2) bias_hidden=8 "
    "--size 64 --batch 4 --normalise none --device cpu --calibration 2 --eval-images 16 "
    "--probe-images 32 --optim.drop-path 0.3 --losses.teacher-drop 0.5 "
    f"--losses.weighting uncertainty --every.log 1 --steps {STEPS} --every.checkpoint {SAVES} "
    f"--every.evaluate {STEPS // 3}"
)
"""A run of all scenarios; its student is small enough that a checkpoint has less than 2 MB."""
FOUND: list[tuple[str, float, str]] = []
"""Scenario, seconds, what came of it."""


@dataclass
class Started:
    """A command that goes on, under torchrun or alone, and what it says."""

    process: subprocess.Popen
    log: Path
    out: Path

    def step(self) -> int:
        """Return the last step that is logged; 0 before."""
        path = self.out / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.is_file() else []
        steps = (json.loads(row)["step"] for row in reversed(rows) if row.endswith("}"))
        return next(steps, 0)

    def reach(self, step: int, seconds: float = 900) -> None:
        """Wait until a step is logged."""
        end = time.monotonic() + seconds
        while self.step() < step:
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < end, f"step {step} did not come"
            time.sleep(0.05)

    def end(self, seconds: float = 900) -> int:
        """Wait for the end, and tell how far it is; return the exit code."""
        end, told = time.monotonic() + seconds, 0
        while self.process.poll() is None:
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"it hangs at step {self.step()}: {self.said()[-3000:]}")
            step = self.step()
            if step < told or step >= told + STEPS // 4:
                say(f"step {step} of {STEPS}" + (", begun again" if step < told else ""))
                told = step
            time.sleep(0.2)
        return self.process.returncode

    def said(self) -> str:
        return self.log.read_text()

    def own_lines(self) -> list[str]:
        """Return the lines with which zoo says that it stops."""
        return [line for line in self.said().splitlines() if line.startswith("zoo: ")]


@dataclass
class Soak:
    """One scenario."""

    name: str
    place: Path
    cache: Path
    draw: random.Random
    began: float = field(default_factory=time.monotonic)
    going: list[Started] = field(default_factory=list)

    def start(
        self,
        *words: str,
        out: Path,
        faults: Sequence[tuple] = (),
        processes: int = 2,
        agent: Sequence[str] = (),
        restarts: int = 0,
        cache: Path | None = None,
    ) -> Started:
        """Start `zoo` on processes, with faults in them.

        Args:
            agent: What torchrun is told in place of --standalone.
        """
        place = self.place / f"faults-{len(self.going)}"
        place.mkdir()
        (place / "faults.json").write_text(json.dumps(faults))
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launch += [f"--max-restarts={restarts}", *(agent or ("--standalone",)), "--"]
        faulty = [str(Path(__file__).with_name("faulty.py")), str(place)]
        command = [sys.executable, *(launch if processes > 1 or agent else ()), *faulty, *words]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "ZOO_CACHE": str(cache or self.cache),
        }
        log = place / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=self.place
            )
        self.going.append(Started(process, log, out))
        return self.going[-1]

    def run(self, *words: str, out: Path, **how) -> Started:
        """Start, wait, and hold the exit code to be 0."""
        started = self.start(*words, "--out", str(out), out=out, **how)
        assert started.end() == 0, started.said()[-3000:]
        return started

    def resume(self, out: Path, **how) -> Started:
        """Go on with a run, to its end."""
        started = self.start("distill", "--resume", str(out), out=out, **how)
        assert started.end() == 0, started.said()[-3000:]
        return started

    def steps(self, count: int) -> list[int]:
        """Draw steps at which something happens, behind the first checkpoint.

        And before the last but one: what is saved at a stop would stay beside the last.
        """
        return sorted(self.draw.sample(range(SAVES + 1, STEPS - SAVES), count))

    def written_elsewhere(self, out: Path) -> list[str]:
        """Return what ranks above 0 wrote that is not a shard of a checkpoint of their own.

        Each tries whether it could, with a file that has no name: it opens the folder itself.
        """
        found = []
        for file in self.place.glob("faults-*/written-*"):
            own = f"__{file.name.rpartition('-')[2]}_"
            for line in file.read_text().splitlines():
                event, _, path = line.partition(" ")
                folder = str(out / "checkpoints")
                shard = path.startswith(folder) and Path(path).name.startswith(own)
                made = event == "os.mkdir" and path.startswith(folder)
                if not (shard or made or (event, path) == ("open", str(out))):
                    found.append(line)
        return found

    def close(self, text: str) -> None:
        """Tell what came of it."""
        FOUND.append((self.name, time.monotonic() - self.began, text))
        say(text)


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def newest(out: Path) -> Path:
    return checkpoints(out / "checkpoints")[-1]


def digest(out: Path) -> str:
    """Return the sha256 of all that the newest checkpoint of a run holds, which is whole."""
    path = newest(out)
    assert not damage(path)
    tensors, rest = split(read_checkpoint(path))
    total = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def files(out: Path) -> set[str]:
    """Return what a run has written; TensorBoard has a file for each start, with the time."""
    found = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    return {str(path) if path.parts[0] != "tensorboard" else "tensorboard" for path in found}


@dataclass
class Twin:
    """The same run, undisturbed."""

    out: Path
    sha256: str
    words: Sequence[str] = tuple(RUN)
    saves: Sequence[int] = tuple(range(SAVES, STEPS, SAVES))

    def keys(self, step: int) -> list[str]:
        """Return the names of a step's samples, as the plan says."""
        config = Run(self.out).config(Distill)
        train, *_ = open_data(config)
        plan = Plan(len(train), config.batch, config.seed, config.view_epochs, config.batches)
        return [train.key(index) for index in plan.indices(step)]

    def assert_same_end(self, out: Path, *, more: Sequence[str] = ()) -> None:
        """Hold parameters, optimizer, every measured number and the list of files to be equal.

        Args:
            more: Files that the fault leaves.
        """
        assert digest(out) == self.sha256
        for name in ("metrics.jsonl", "export/model.safetensors"):
            assert (out / name).read_bytes() == (self.out / name).read_bytes(), name
        assert files(out) == files(self.out) | {*more}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for what zoo keeps; the images that it ships are in it, so no rank unpacks them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder))
        EMBEDDED["embedded"]()
    return folder


@pytest.fixture
def soak(request, tmp_path, cache, monkeypatch):
    """The scenario that a test is; processes that it leaves are killed."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    print(f"\n{name}", flush=True)
    monkeypatch.setenv("ZOO_CACHE", str(cache))
    scenario = Soak(name, tmp_path, cache, random.Random(f"{SEED} {name}"))
    yield scenario
    for started in scenario.going:
        if started.process.poll() is None:
            started.process.kill()


@pytest.fixture(scope="session")
def twin(tmp_path_factory, cache):
    """The run of two processes to which nothing happens."""
    place = tmp_path_factory.mktemp("twin")
    scenario = Soak("undisturbed", place, cache, random.Random(SEED))
    print(f"\n{scenario.name}: {STEPS} steps, SOAK_SEED={SEED}", flush=True)
    out = scenario.place / "run"
    scenario.run(*RUN, out=out)
    assert not scenario.written_elsewhere(out)
    sha256 = digest(out)
    rate = STEPS / (time.monotonic() - scenario.began)
    scenario.close(f"sha256 {sha256[:12]}, {rate:.1f} steps/s with start and end")
    return Twin(out, sha256)


def largest_gap(ours: Path, theirs: Path) -> float:
    """Return the largest difference of two runs' weights, averages and learned loss weights."""
    first, second = ({**split(read_checkpoint(newest(out)))[0]} for out in (ours, theirs))
    names = [name for name in first if name.startswith(("model.", "ema.", "parts."))]
    assert first.keys() == second.keys() and names
    return max((first[n].double() - second[n].double()).abs().max().item() for n in names)


@pytest.fixture
def gap():
    return largest_gap


def pytest_terminal_summary(terminalreporter):
    if not FOUND:
        return
    terminalreporter.section(f"soak, {STEPS} steps, SOAK_SEED={SEED}")
    for name, seconds, text in FOUND:
        terminalreporter.write_line(f"{seconds:6.0f} s  {name}: {text}")
