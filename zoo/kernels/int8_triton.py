"""The Triton kernel behind `zoo.kernels.int8`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def _set_tile(arguments: dict[str, Any]) -> None:
    arguments["left"].block_shape = [arguments["BM"], arguments["BK"]]
    arguments["right"].block_shape = [arguments["BN"], arguments["BK"]]


CONFIGS = [
    triton.Config(dict(BM=bm, BN=bn, BK=bk, GROUP=8), num_stages=s, num_warps=8, pre_hook=_set_tile)
    for bm, bn, bk, s in (
        (128, 256, 128, 3), (128, 256, 128, 4), (256, 128, 128, 3), (128, 128, 128, 4),
        (128, 256, 64, 4),
    )
]  # fmt: skip


@triton.jit
def product(
    left, right, out, row_scale, row_centre, scale, total, bias, m, n, k,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Fill one block of `out`; see `zoo.kernels.int8.int8_product` for the letters."""
    # blocks that share weights run close in time, so that these stay in L2
    place = tl.program_id(0)
    down, across = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = place // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    i = group * GROUP + (place % (GROUP * across)) % height
    j = (place % (GROUP * across)) // height
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for step in range(tl.cdiv(k, BK)):
        a = left.load([i * BM, step * BK])
        b = right.load([j * BN, step * BK])
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    rows = i * BM + tl.arange(0, BM)
    cols = j * BN + tl.arange(0, BN)
    inside, there = rows < m, cols < n
    s = tl.load(row_scale + rows, mask=inside, other=0.0)
    c = tl.load(row_centre + rows, mask=inside, other=0.0)
    t = tl.load(scale + cols, mask=there, other=0.0)
    w = tl.load(total + cols, mask=there, other=0.0)
    result = sums.to(tl.float32) * s[:, None] * t[None, :] + c[:, None] * w[None, :]
    if HAS_BIAS:
        result += tl.load(bias + cols, mask=there, other=0.0).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(target, result.to(tl.bfloat16), mask=inside[:, None] & there[None, :])


tuned = triton.autotune(CONFIGS, key=["n", "k"])(product)
"""`product` in the block sizes that were fastest at the first call for each shape of weights."""


def launch(
    rows: Tensor,
    row_scale: Tensor,
    row_centre: Tensor,
    weight: Tensor,
    scale: Tensor,
    total: Tensor,
    bias: Tensor | None,
    *,
    kernel: Any = tuned,
    **blocks: int,
) -> Tensor:
    """Run the kernel.

    Args:
        kernel: `tuned`, or `product` with its block sizes in `blocks`.
    """
    (m, k), n = rows.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=torch.bfloat16, device=rows.device)
    bm, bn, bk = (blocks.get(name, 1) for name in ("BM", "BN", "BK"))  # 1: the tuner fills it in
    left = TensorDescriptor(rows, [m, k], [k, 1], [bm, bk])
    right = TensorDescriptor(weight, [n, k], [k, 1], [bn, bk])

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, chosen["BM"]) * triton.cdiv(n, chosen["BN"]),)

    kernel[grid](
        left, right, out, row_scale, row_centre, scale, total, total if bias is None else bias,
        m, n, k, HAS_BIAS=bias is not None, **blocks,
    )  # fmt: skip
    return out
