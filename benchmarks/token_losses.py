"""The divergence over a large vocabulary on one GPU: ours, all logits at once, Liger's, the floor.

python3 benchmarks/token_losses.py                     # 8,192 tokens x 128,256 and x 262,144
python3 benchmarks/token_losses.py --json FILE

Forward and backward, bf16 hidden states, the student's head in float32 (as an optimizer keeps it)
and the teacher's in bf16. The floor is the time of the four matrix products that no way avoids
(both sides' logits, the gradients of hidden states and head), in bf16. Memory is the peak beyond
what is there before, the head's own gradient and its copy in bf16, which every way makes. Liger is
left out where it is not installed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from zoo.train.distill.token_losses import kl

CASES = ((8192, 128_256, 4096), (8192, 128_256, 3072), (8192, 262_144, 640))
"""Tokens, vocabulary, width."""
GB = 1e9


def ours_with(chunk: int) -> Callable[..., Tensor]:
    """Return our loss, as a mean."""

    def loss(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> Tensor:
        counted = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        return kl(hidden, head, theirs, their_head, counted, chunk=chunk) / len(hidden)

    return loss


def naive(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> Tensor:
    """Make all logits, and leave the rest to autograd."""
    log_s = (hidden @ head.to(hidden.dtype).T).float().log_softmax(-1)
    with torch.no_grad():
        log_t = (theirs @ their_head.T).float().log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def ligers() -> dict[str, Callable[..., Tensor]]:
    """Return Liger's two losses, if it is there; it halves the operands itself."""
    try:
        from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSDLoss,
        )
        from liger_kernel.transformers.fused_linear_jsd import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSD,
        )
    except ImportError as error:
        print(f"Liger is left out: {error}")
        return {}
    chunked = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=1024
    )
    fused = LigerFusedLinearJSD(jsd_beta=0.0)

    def chunked_loss(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> Tensor:
        ids = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        found: Any = chunked(hidden, head.to(hidden.dtype), theirs, their_head, ids)
        return found[0] if isinstance(found, tuple) else found

    def fused_loss(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> Tensor:
        return fused(hidden, head.to(hidden.dtype), theirs, their_head, None)

    return {"Liger, chunked torch": chunked_loss, "Liger, Triton": fused_loss}


def products(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor) -> float:
    """Time the four products, each at its best, in milliseconds."""
    weight = head.detach().to(hidden.dtype)
    hidden = hidden.detach()
    logits = hidden @ weight.T
    calls = (
        lambda: hidden @ weight.T,
        lambda: theirs @ their_head.T,
        lambda: logits @ weight,
        lambda: logits.T @ hidden,
    )
    return sum(milliseconds(call) for call in calls)


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    found: Any = do_bench(call, warmup=100, rep=400, return_mode="median")
    return found


def measure(loss: Callable[..., Tensor], sides: tuple[Tensor, ...]) -> dict[str, float]:
    """Return time, peak memory beyond the gradient, the loss, and the gradients' errors."""
    hidden, head = sides[:2]

    def step() -> Tensor:
        hidden.grad = head.grad = None
        value = loss(*sides)
        value.backward()
        return value

    step()
    hidden.grad = head.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = step()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - (4 + 2) * head.numel()
    exact = exact_gradients(sides)
    assert hidden.grad is not None and head.grad is not None
    grads = dict(hidden=hidden.grad[:256], head=head.grad)
    errors = {
        f"{name}_error": ((grads[name].double() - true).norm() / true.norm()).item()
        for name, true in exact.items()
    }
    hidden.grad = head.grad = None
    del grads, exact
    return dict(ms=milliseconds(step), gb=beyond / GB, loss=value.item(), **errors)


@torch.no_grad()
def exact_gradients(sides: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return float64's gradients: of the first 256 hidden states, and of the whole head."""
    hidden, head, theirs, their_head = (side.detach() for side in sides)
    weight = head.to(hidden.dtype).double()
    d_head, d_hidden = torch.zeros_like(weight), None
    for part in torch.arange(len(hidden), device=hidden.device).split(256):
        p_s = (hidden[part].double() @ weight.T).softmax(-1)
        p_t = (theirs[part].double() @ their_head.double().T).softmax(-1)
        gap = (p_s - p_t) / len(hidden)
        d_head.addmm_(gap.T, hidden[part].double())
        d_hidden = gap @ weight if d_hidden is None else d_hidden
    assert d_hidden is not None
    return dict(hidden=d_hidden, head=d_head)


def case(tokens: int, vocabulary: int, width: int) -> list[dict[str, Any]]:
    """Measure one size."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(tokens, width, **options).requires_grad_()
    theirs = (hidden.detach().float() + 0.5 * torch.randn(tokens, width, device="cuda")).bfloat16()
    head = torch.randn(vocabulary, width, device="cuda") * 3 / width**0.5
    their_head = head.bfloat16()
    sides = (hidden, head.requires_grad_(), theirs, their_head)
    floor = products(*sides)
    print(f"\n{tokens:,} tokens x {vocabulary:,}, width {width}: four products {floor:.1f} ms")
    ways = {f"ours, chunks of {n}": ours_with(n) for n in (512, 1024)}
    rows = []
    for name, loss in (ways | {"all logits at once": naive} | ligers()).items():
        try:
            found = measure(loss, sides)
        except torch.cuda.OutOfMemoryError:
            print(f"{name:24} does not fit")
            continue
        finally:
            torch.cuda.empty_cache()
        rows.append(dict(found, way=name, tokens=tokens, vocabulary=vocabulary, width=width))
        rows[-1] |= dict(products_ms=floor, times=found["ms"] / floor)
        print(
            f"{name:24} {found['ms']:7.1f} ms = {found['ms'] / floor:.2f} x products, "
            f"{found['gb']:6.2f} GB, loss {found['loss']:.5f}, errors of the gradients "
            f"{found['hidden_error']:.1e} (hidden) {found['head_error']:.1e} (head)"
        )
    return rows


def main() -> None:
    """Measure every size, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = [row for size in CASES for row in case(*size)]
    if args.json:
        about = dict(device=torch.cuda.get_device_name(), torch=torch.__version__)
        args.json.write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
