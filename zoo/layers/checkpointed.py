"""Trade compute for memory: run a block again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """Let batch norms normalise with the batch, but not update their running statistics."""
    norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def checkpointed(block: nn.Module, *inputs: Any) -> Any:
    """Return `block(*inputs)`, keeping only `inputs`; the backward pass runs the block again.

    Batch norms update their running statistics once. Under plain `torch.utils.checkpoint` the
    second run would update them again; under `torch.compile`, which takes no contexts here, it
    still may.
    """
    if torch.compiler.is_compiling():
        return checkpoint(block, *inputs, use_reentrant=False)
    contexts = lambda: (nullcontext(), _statistics_at_rest(block))  # noqa: E731
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
