"""Measure the error of each family's output and gradients on a GPU against eager float32.

    python3 benchmarks/gradient_error.py [--models NAME ...] [--worst 5] [--dirty] [--save FILE]

Random weights, 4 images at the family's own size, eval mode (drop path would draw), the loss a
fixed random weighting of the outputs. Paths: autocast with torch's own kernels alone; autocast with
this repository's kernels, which is how models run on a GPU; the same compiled. An error is the
norm of the difference over the norm, for the gradients over all parameters together; --worst names
the parameters with the largest differences. --dirty leaves NaN in free memory before each path: a
fresh process gets zeros, which hide a kernel that reads what nobody wrote.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.eval.speed.cost import build
from zoo.kernels import available as fused

MODELS = {
    "mambavision_t": 224,
    "mambavision_l": 224,
    "fastervit_0": 224,
    "fastervit_4": 224,
    "eradio_xxxtiny": 256,
    "eradio_l,window_size=8": 256,
}
COLUMNS = (
    "model",
    "torch's kernels: output",
    "gradients",
    "ours: output",
    "gradients",
    "ours compiled: output",
    "gradients",
)


def answer(model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradient of each parameter, flat."""
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    loss, parameters = (y * weights).float().sum(), list(module.parameters())
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return [t.detach().double().flatten() for t in (y, *grads)]


def error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """Return the relative error of some tensors together."""
    parts = [((a - b).norm(), b.norm()) for a, b in zip(ours, exact, strict=True)]
    wrong, whole = (torch.stack(norms).norm() for norms in zip(*parts, strict=True))
    return float(wrong / whole)


def leave_nan() -> None:
    """Fill the memory of the next tensors, small and large, with NaN."""
    blocks = [torch.full((2**17,), math.nan, device="cuda") for _ in range(2000)]
    blocks += [torch.full((2**25,), math.nan, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()


def name_worst(module: nn.Module, ours: list[Tensor], exact: list[Tensor], count: int) -> None:
    """Print the parameters whose gradients differ most, NaN first."""
    names = [name for name, _ in module.named_parameters()]
    found = {n: float((a - b).norm()) for n, a, b in zip(names, ours, exact, strict=True)}
    order = sorted(names, key=lambda n: (math.isnan(found[n]), found[n]), reverse=True)
    for name in order[:count]:
        share = found[name] / float(exact[names.index(name)].norm())
        print(f"    {name}: {share:.1e} of its norm", flush=True)


def errors(name: str, size: int, *, worst: int, dirty: bool) -> list[str]:
    """Measure one model."""
    module = build(name, size, "cuda")
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).cuda()
    exact = answer(module, module, x)
    found = []
    for kernels, compiled in ((False, False), (True, False), (True, True)):
        fused.HAS_TRITON = kernels
        if dirty:
            leave_nan()
        model = torch.compile(module, dynamic=False) if compiled else module
        with torch.autocast("cuda", torch.bfloat16):
            ours = answer(model, module, x)
        found += [f"{error(ours[part], exact[part]):.1e}" for part in (slice(1), slice(1, None))]
        if worst:
            print(f"  {name}, kernels {kernels}, compiled {compiled}: {found[-1]}")
            name_worst(module, ours[1:], exact[1:], worst)
    torch.compiler.reset()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", type=Path, help="also write the table here")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--worst", type=int, default=0, help="name so many parameters a path")
    parser.add_argument("--dirty", action="store_true", help="leave NaN in free memory first")
    args = parser.parse_args()
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for name in args.models:
        cells = errors(name, MODELS[name], worst=args.worst, dirty=args.dirty)
        lines.append("| " + " | ".join([name, *cells]) + " |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if args.save:
        args.save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
