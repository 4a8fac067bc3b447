"""Products and layers in 8 bits on one GPU, in TFLOP/s: what quantizing the inputs costs.

python3 benchmarks/quantized_layers.py

The shapes are those of CLIP ViT-H/14 at 378, batch 128. `product` has its operands in 8 bits
already; `layer` is `zoo.teachers.quantize.QuantizedLinear`, compiled, which first finds a scale for
each row. Medians of `triton.testing.do_bench`, which empties the cache before each call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from triton.testing import do_bench

from zoo.kernels.int8_triton import launch
from zoo.teachers.quantize import QuantizedLinear

ROWS = 128 * 730
SHAPES = ((1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280))


def rate(width: int, out: int, call: Callable[[], Any]) -> str:
    """Time `call`, a product of `ROWS` rows with [width out], and return its TFLOP/s as text."""
    milliseconds: Any = do_bench(call, return_mode="median")
    return f"{2 * ROWS * width * out / milliseconds / 1e9:,.0f}"


def products(width: int, out: int) -> dict[str, Callable[[], Tensor]]:
    """Return the products alone, as functions by name."""
    x, w = (
        torch.randint(-127, 127, (n, width), device="cuda", dtype=torch.int8) for n in (ROWS, out)
    )
    scales, centres = torch.rand(2, ROWS, device="cuda")
    columns, totals = torch.rand(2, out, device="cuda")
    left, right = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    return {
        "int8 product": lambda: launch(x, scales, centres, w, columns, totals, None),
        "torch's int8 product": lambda: torch._int_mm(x, w.T),
        "fp8 product": lambda: torch._scaled_mm(
            left,
            right.T,
            scale_a=scales[:, None],
            scale_b=columns[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    }


def main() -> None:
    """Print one line for each shape."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for width, out in SHAPES:
        x = torch.randn(ROWS, width, device="cuda").bfloat16()
        layer = nn.Linear(width, out).cuda().bfloat16()
        found = {"bf16": rate(width, out, lambda layer=layer, x=x: layer(x))}
        found |= {name: rate(width, out, call) for name, call in products(width, out).items()}
        for kind in ("int8", "fp8"):
            with torch.inference_mode():
                quantized = torch.compile(QuantizedLinear(layer, kind).cuda(), dynamic=False)
                found[f"{kind} layer"] = rate(width, out, lambda q=quantized, x=x: q(x))
        rates = ", ".join(f"{name} {value}" for name, value in found.items())
        print(f"{ROWS} x {width} -> {out}: {rates}", flush=True)


if __name__ == "__main__":
    main()
