"""Output and gradients of each family on a GPU against eager float32: what each path costs.

    python3 benchmarks/gradient_error.py [--save FILE]

Random weights, 4 images at the family's own size, eval mode (drop path would draw), the loss a
fixed random weighting of the outputs. Paths: autocast with torch's own kernels alone; autocast with
this repository's kernels, which is how models run on a GPU; the same compiled. An error is the
norm of the difference over the norm, for the gradients over all parameters together.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.eval.speed import build
from zoo.layers import fused

MODELS = {"mambavision_t": 224, "mambavision_l": 224, "fastervit_0": 224, "fastervit_4": 224,
          "eradio_xxxtiny": 256, "eradio_l,window_size=8": 256}  # fmt: skip
COLUMNS = ("model", "torch's kernels: output", "gradients", "ours: output", "gradients",
           "ours compiled: output", "gradients")  # fmt: skip


def answer(model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Give the output and all gradients, flat."""
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad((y * weights).float().sum(), list(module.parameters()))
    return [y.detach().double().flatten(), torch.cat([g.double().flatten() for g in grads])]


def errors(name: str, size: int) -> list[str]:
    """Measure one model."""
    module = build(name, size, "cuda")
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).cuda()
    exact = answer(module, module, x)
    found = []
    for kernels, compiled in ((False, False), (True, False), (True, True)):
        fused.HAS_TRITON = kernels
        model = torch.compile(module, dynamic=False) if compiled else module
        with torch.autocast("cuda", torch.bfloat16):
            ours = answer(model, module, x)
        found += [f"{(a - b).norm() / b.norm():.1e}" for a, b in zip(ours, exact, strict=True)]
    torch.compiler.reset()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", type=Path, help="also write the table here")
    save = parser.parse_args().save
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for name, size in MODELS.items():
        lines.append("| " + " | ".join([name, *errors(name, size)]) + " |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if save:
        save.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
