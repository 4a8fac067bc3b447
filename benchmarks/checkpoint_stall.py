"""What a checkpoint costs training: a ViT-H with AdamW under FSDP2, saved while it learns.

torchrun --nproc-per-node 1 benchmarks/checkpoint_stall.py --json stall.json
torchrun --nproc-per-node 1 benchmarks/checkpoint_stall.py --model test_vit --size 160 --batch 2 \
    --steps 12 --every 4 --device cpu                        # a rehearsal

Each step's time is that between two events of the device. The stall of a checkpoint is what the
steps up to the next one take beyond their number times the median step, as a share of that. Losses
are logged twice as often, so that what the first log makes (its writers) is not taken for a part of
the first checkpoint. In the end the last one is compared with the model bit by bit.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.train.checkpoint import checkpoints, read_checkpoint
from zoo.train.config import Every, Optim, Training
from zoo.train.device import device_of
from zoo.train.loop import train
from zoo.train.mesh import from_first, ranks
from zoo.train.run import Run
from zoo.train.shard import is_sharded, whole
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Settings of this training."""

    kind: ClassVar[str] = "checkpoint_stall"
    may_cut: ClassVar[bool] = True


class Noise:
    """The same images at every step, on the device."""

    slices = (0,)

    def __init__(self, images: Tensor):
        self.images = images

    def batches(self, start: int, steps: int) -> Iterator[Tensor]:
        """Return a batch a step."""
        return (self.images for _ in range(start, steps))

    def counts(self, step: int) -> dict[str, int]:
        """Count images."""
        return dict(mse=len(self.images))

    def keys(self, step: int) -> list[str]:
        """Name nothing."""
        return []

    def skipped(self) -> list[str]:
        """Skip nothing."""
        return []


class Timed(Task):
    """A loss of no meaning, and the time at which each step begins."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, list[Any]()

    def losses(self, state: TrainState, batch: Tensor, targets: Any, step: int) -> dict[str, Loss]:
        """Run the model."""
        if self.device.type == "cuda":
            self.times.append(torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())
        out = state.model(batch).float()
        return dict(mse=Loss(F.mse_loss(out, torch.ones_like(out)) * len(batch), len(batch)))

    def seconds(self) -> list[float]:
        """Return what each step but the last took."""
        pairs = zip(self.times, self.times[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


class TimedRun(Run):
    """A run that notes how long each save holds training up."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.blocked = list[float]()

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save, with the time."""
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        began = time.perf_counter()
        super().save(*args, **kwargs)
        self.blocked.append(time.perf_counter() - began)


def stalls(seconds: list[float], every: int) -> tuple[float, list[float]]:
    """Return the median step, and the share that each interval behind a checkpoint is longer."""
    median = statistics.median(seconds[every // 2 :])
    starts = range(every, len(seconds) - every + 2, every)
    spans = [seconds[start - 1 : start - 1 + every] for start in starts]
    return median, [sum(span) / (len(span) * median) - 1 for span in spans]


def watch_collections(task: Timed, found: list[tuple[int, float]]) -> Callable[[str, Any], None]:
    """Return what notes each collection of garbage: its step, and its milliseconds."""
    began = [0.0]

    def note(phase: str, about: Any) -> None:
        now = time.perf_counter()
        if phase == "start":
            began[0] = now
        else:
            found.append((len(task.times), 1000 * (now - began[0])))

    return note


def main() -> None:
    """Train, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vit_huge_patch14_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a folder on the disk that is meant")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = device_of(args.device)  # that of LOCAL_RANK
    torch.manual_seed(0)
    task, collected = Timed(device), list[tuple[int, float]]()
    gc.callbacks.append(watch_collections(task, collected))
    with ranks(device), tempfile.TemporaryDirectory(dir=args.out) as own:
        folder = from_first(own)
        model = timm.create_model(args.model, img_size=args.size).to(device)
        config = Settings(
            steps=args.steps, batch=args.batch, device=args.device, ranks="fsdp", keep=1,
            every=Every(log=max(1, args.every // 2), checkpoint=args.every, evaluate=10**9),
            optim=Optim(ema=0.0), out=Path(folder),
        )  # fmt: skip
        state = TrainState.of(model, config.optim, ranks="fsdp")
        images = torch.rand(args.batch, 3, args.size, args.size, device=device)
        run = TimedRun(Path(folder))
        train(task, state, Noise(images), config, run, title="stall")
        seconds = task.seconds()
        median, found = stalls(seconds, args.every)
        path = checkpoints(run.path / "checkpoints")[-1]
        size = sum(file.stat().st_size for file in path.iterdir())
        read = read_checkpoint(path)["model"]
        now = {name: whole(x).cpu() for name, x in state.model.state_dict().items()}
        same = all(torch.equal(read[name], x) for name, x in now.items())
        row = dict(
            model=args.model, batch=args.batch, every=args.every, torch=torch.__version__,
            cut=is_sharded(state.learned), step_ms=1000 * median, checkpoint_gb=size / 1e9,
            stall=found, blocked_s=run.blocked, steps_ms=[round(1000 * t, 1) for t in seconds],
            longest_step_ms=1000 * max(seconds[args.every // 2 :]), equal=same,
            collections_ms=[(step, round(ms, 1)) for step, ms in collected if ms > 5],
        )  # fmt: skip
        if device.type == "cuda":
            row |= dict(
                gpu=torch.cuda.get_device_name(), peak_gb=torch.cuda.max_memory_allocated() / 1e9
            )
        print(json.dumps({name: value for name, value in row.items() if name != "steps_ms"}))
        if args.json and os.environ.get("RANK", "0") == "0":
            args.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
