"""The product of int8 rows with int8 weights, scaled back to bfloat16 as it leaves the chip.

`torch._int_mm` gives int32: four bytes a number to write and to read again, which costs more than
8 bits save. The Triton kernel scales, centres and adds the bias before anything is written.
"""

import torch
from torch import Tensor


@torch.library.custom_op("zoo::int8_product", mutates_args=())
def int8_product(
    rows: Tensor,
    row_scale: Tensor,
    row_centre: Tensor,
    weight: Tensor,
    scale: Tensor,
    total: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Multiply: out[m, n] = s_m t_n Σ_k q[m, k] w[n, k] + c_m W_n + b_n, in bfloat16.

    Args:
        rows: q, int8 [M K].
        row_scale: s, float32 [M].
        row_centre: c, float32 [M].
        weight: w, int8 [N K].
        scale: t, float32 [N].
        total: W, float32 [N], the sums of the scaled weights over K.
        bias: b, [N].
    """
    if rows.is_cuda:
        return _on_gpu(rows, row_scale, row_centre, weight, scale, total, bias)
    out = torch._int_mm(rows, weight.T).float() * row_scale[:, None] * scale
    out = out + row_centre[:, None] * total
    return (out if bias is None else out + bias.float()).to(torch.bfloat16)


@int8_product.register_fake
def _(rows, row_scale, row_centre, weight, scale, total, bias):
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=torch.bfloat16)


def _on_gpu(rows, row_scale, row_centre, weight, scale, total, bias) -> Tensor:
    from zoo.teachers.int8_kernel import launch  # Triton, which a CPU build of torch lacks

    return launch(rows, row_scale, row_centre, weight, scale, total, bias)
