"""The product of int8 rows with int8 weights, scaled back to bfloat16 before it is written.

`torch._int_mm` returns int32: four bytes a number to write and to read again, which costs more
than 8 bits save. The Triton kernel scales, centres and adds the bias before anything is written.
"""

import torch
from torch import Tensor

from zoo.kernels.operator import register


def int8_product(
    rows: Tensor,
    row_scale: Tensor,
    row_centre: Tensor,
    weight: Tensor,
    scale: Tensor,
    total: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute out[m, n] = s_m t_n Σ_k q[m, k] w[n, k] + c_m W_n + b_n, in bfloat16 [M N].

    Args:
        rows: q, int8 [M K].
        row_scale: s, float32 [M].
        row_centre: c, float32 [M].
        weight: w, int8 [N K].
        scale: t, float32 [N].
        total: W, float32 [N], the sums of the scaled weights over K.
        bias: b, [N].
    """
    return torch.ops.zoo.int8_product(rows, row_scale, row_centre, weight, scale, total, bias)


def _cpu(rows, row_scale, row_centre, weight, scale, total, bias):
    out = torch._int_mm(rows, weight.T).float() * row_scale[:, None] * scale
    out = out + row_centre[:, None] * total
    return (out if bias is None else out + bias.float()).to(torch.bfloat16)


def _cuda(rows, row_scale, row_centre, weight, scale, total, bias):
    from zoo.kernels.int8_triton import launch  # Triton, which a CPU build of torch lacks

    return launch(rows, row_scale, row_centre, weight, scale, total, bias)


def _fake(rows, row_scale, row_centre, weight, scale, total, bias):
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=torch.bfloat16)


register(
    "int8_product(Tensor rows, Tensor row_scale, Tensor row_centre, Tensor weight, Tensor scale,"
    " Tensor total, Tensor? bias) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
