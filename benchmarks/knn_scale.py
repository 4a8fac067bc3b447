"""kNN at the size of ImageNet on synthetic features: time and memory, on a GPU and on a CPU.

    python benchmarks/knn_scale.py                              # 1.28 M x 1,536, where it runs
    python benchmarks/knn_scale.py --rows 100_000 --queries 500 --device cpu

Features are class centres plus noise that is much larger than the distances of the centres, stored
in half precision as by `zoo embed`. A query's true neighbours are of its class only on average, so
the printed accuracy is a check that something was found, not a result. With fewer queries than
ImageNet's, the minutes for all of them are extrapolated from two measurements.
"""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from zoo.eval.knn import predict_knn
from zoo.eval.speed.environment import environment

IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
ROWS_AT_ONCE = 2**15


@dataclass(frozen=True, kw_only=True)
class Scale:
    rows: int = IMAGENET_TRAIN
    queries: int | None = None
    """50,000 on a GPU by default; 500 on a CPU, from which the time is extrapolated."""
    dim: int = 1536
    classes: int = 1000
    noise: float = 4.0
    """Standard deviation of a feature within its class; between classes it is 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bank_on: Literal["device", "host"] = "device"
    """Where the bank is; from the host it is moved to the device part by part."""
    single: bool = False
    """Store float32, which needs twice the memory."""
    threads: int | None = None
    out: Path | None = None
    """Write this JSON file."""


def features(count: int, args: Scale, place: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Return random rows and their classes, generated part by part."""
    draws = torch.Generator(place).manual_seed(seed)
    centres = torch.randn(
        args.classes, args.dim, device=place, generator=torch.Generator(place).manual_seed(99)
    )
    labels = torch.randint(args.classes, (count,), device=place, generator=draws)
    rows = torch.empty(
        count, args.dim, device=place, dtype=torch.float32 if args.single else torch.float16
    )
    for some, known in zip(rows.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True):
        noise = torch.randn(len(some), args.dim, device=place, generator=draws)
        some.copy_(centres[known] + args.noise * noise)
    return rows, labels


def timed(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, device: torch.device
) -> tuple[float, float]:
    """Return the accuracy in per cent and the seconds of one classification."""
    began = time.perf_counter()
    predicted = predict_knn(bank, labels, queries, truth, device=device)
    right = 100 * float((predicted.cpu() == truth.cpu()).double().mean())  # waits for the device
    return right, time.perf_counter() - began


def main(args: Scale) -> dict:
    """Measure once, and print the results."""
    if args.threads:
        torch.set_num_threads(args.threads)
    has_gpu = torch.cuda.is_available()
    device = torch.device(("cuda" if has_gpu else "cpu") if args.device == "auto" else args.device)
    on_gpu = device.type == "cuda"
    count = args.queries or (IMAGENET_VAL if on_gpu else 500)
    bank, labels = features(
        args.rows, args, device if args.bank_on == "device" else torch.device("cpu"), 0
    )
    queries, truth = features(count, args, bank.device, 1)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else _resident()
    right, seconds = timed(bank, labels, queries, truth, device)
    walk = 0.0
    if (
        count < IMAGENET_VAL
    ):  # the bank is read once for any number of queries: fit a line to two points
        few = max(1, count // 4)
        _, less = timed(bank, labels, queries[:few], truth[:few], device)
        walk = max(0.0, less - few * (seconds - less) / max(1, count - few))
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident()
    found = dict(
        rows=args.rows,
        queries=count,
        dim=args.dim,
        classes=args.classes,
        noise=args.noise,
        dtype=str(bank.dtype),
        device=device.type,
        bank_on=str(bank.device),
        seconds=seconds,
        walk_seconds=walk,
        queries_per_s=count / (seconds - walk),
        imagenet_minutes=(walk + IMAGENET_VAL * (seconds - walk) / count) / 60,
        tflops=2 * args.rows * count * args.dim / seconds / 1e12,
        features_gib=held / 2**30,
        peak_gib=peak / 2**30,
        top1=right,
    )
    for name, value in found.items():
        print(f"{name:>18}  {value:,.3f}" if isinstance(value, float) else f"{name:>18}  {value}")
    if args.out:
        args.out.write_text(json.dumps({**environment(), **found}, indent=1) + "\n")
    return found


def _resident() -> int:
    """Return the peak memory of this process, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(tyro.cli(Scale, description=__doc__))
