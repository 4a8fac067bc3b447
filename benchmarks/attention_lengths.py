"""What attention costs where the length is new in each call, with cuDNN's kernels and without.

python3 benchmarks/attention_lengths.py --json attention_lengths.json    # one H200, half a minute
python3 benchmarks/attention_lengths.py --tiny                           # tried on a CPU

cuDNN makes a plan for each shape that it has not met. Three cases: a token is generated behind more
and more others (forward, one query); batches of texts that are as wide as their longest (forward
and backward, under a mask of padding); and the same widths once more, for which there is a plan.
Each row is the median time of a layer's attention. `zoo.language.any_length` leaves cuDNN out.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zoo.language.any_length import any_length

Shape = tuple[int, int, int, int]
"""Rows, heads, tokens, channels of a head."""


def generation(shape: Shape, first: int, count: int, device: str) -> Iterator[Callable[[], Any]]:
    """Yield what attends from one token to one more each time."""
    rows, heads, _, dim = shape
    kept = torch.randn(2, rows, heads, first + count, dim, device=device, dtype=torch.bfloat16)
    query = torch.randn(rows, heads, 1, dim, device=device, dtype=torch.bfloat16)
    for length in range(first, first + count):
        k, v = kept[..., :length, :].contiguous()
        yield lambda k=k, v=v: F.scaled_dot_product_attention(query, k, v)


def training(shape: Shape, first: int, count: int, device: str) -> Iterator[Callable[[], Any]]:
    """Yield what attends in rows of one width, a wider one each time, forward and back."""
    rows, heads, _, dim = shape
    for width in range(first, first + 8 * count, 8):
        size = (3, rows, heads, width, dim)
        q, k, v = torch.randn(size, device=device, dtype=torch.bfloat16).requires_grad_().unbind()
        there = torch.arange(width, device=device) < width - 4
        mask = torch.ones(width, width, dtype=torch.bool, device=device).tril() & there
        mask = mask.expand(rows, 1, width, width)

        def step(q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            torch.autograd.grad(out.float().sum(), (q, k, v))

        yield step


def median_ms(steps: Iterator[Callable[[], Any]], device: str) -> float:
    """Time each call once."""
    times = []
    for step in steps:
        wait(device)
        began = time.perf_counter()
        step()
        wait(device)
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=24, help="lengths of each case")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape: Shape = (2, 2, 0, 16) if args.tiny else (16, 8, 0, 64)
    count, first = (3, 16) if args.tiny else (args.count, 512)
    forms: dict[str, Callable[[], AbstractContextManager]] = dict(
        own=nullcontext, any_length=any_length
    )
    cases = dict(generation=generation, training=training, training_again=training)
    rows = []
    for name, context in forms.items():
        with context():  # the first call of all loads libraries
            median_ms(training(shape, 8, 2, device), device)
            for case, steps in cases.items():
                ms = median_ms(steps(shape, first, count, device), device)
                rows.append(dict(case=case, form=name, ms=ms))
                print(f"{case:15} {name:11} {ms:9.3f} ms", flush=True)
    if args.json:
        where = torch.cuda.get_device_name() if device == "cuda" else device
        found = dict(machine=where, torch=torch.__version__, rows=rows)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
