"""Time a training step of the compression experiment's hybrid: transformers' pass, ours, compiled.

    python benchmarks/hybrid_step.py [--scale small] [--batch 32]

Prints milliseconds, bytes a second and the peak memory of forward, backward and AdamW in bf16.
"""

import argparse
import time

import torch

from zoo.experiments.compression.config import SCALES
from zoo.experiments.compression.hybrid import build_hybrid
from zoo.experiments.fast_mamba import fast


def main() -> None:
    """Time the three ways, the fastest last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="small", choices=SCALES)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    scale, device = SCALES[args.scale], "cuda" if torch.cuda.is_available() else "cpu"
    batch = args.batch or scale.batch
    ids = torch.randint(256, (batch, scale.length), device=device)
    for name in ("transformers", "ours", "ours, compiled"):
        torch.manual_seed(0)
        model = build_hybrid(scale.shape).to(device)
        if name != "transformers":
            fast(model, compiled="compiled" in name)
        seconds = step_time(model, ids, steps=10 if device == "cuda" else 2)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        rate = ids.numel() / seconds
        print(f"{name:15} {1e3 * seconds:8.1f} ms  {rate:12,.0f} B/s  {peak:.1f} GiB", flush=True)


def step_time(model, ids: torch.Tensor, *, steps: int) -> float:
    """Return the seconds of a step, after three that are not timed."""
    device = ids.device.type
    optimizer = torch.optim.AdamW(model.parameters(), fused=device == "cuda")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in range(steps + 3):
        if step == 3:
            wait(device)
            began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        ).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait(device)
    return (time.perf_counter() - began) / steps


def wait(device: str) -> None:
    """Wait until the device has done all work."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
