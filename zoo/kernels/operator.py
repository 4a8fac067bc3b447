"""Register an operator of torch's library `zoo`, with its kernels, result shapes and gradient.

Not by `torch.library.custom_op`, whose checks take half a millisecond a call.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("zoo", "FRAGMENT")


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    cuda: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Make `torch.ops.zoo.NAME`, which compilers and exporters see as a single node.

    Args:
        schema: "NAME(Tensor x, ...) -> Tensor", in the language of torch's operators.
        fake: Returns empty results of the right shapes, dtypes and layouts, without a GPU.
        cuda: Computes the results on a GPU.
        cpu: The same on a CPU; without it, other code must run there.
        setup: Saves what `backward` needs: (ctx, inputs, output).
        backward: Returns a gradient, or `None`, for each input: (ctx, *gradients of the results).
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cuda, "CUDA")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"zoo::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"zoo::{name}", backward, setup_context=setup, lib=_LIBRARY)
