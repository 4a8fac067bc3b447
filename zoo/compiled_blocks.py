"""torch.compile block by block: blocks that are alike share the code of one.

Compiling a network whole takes up to twice as long (docs/speed.md); the price is a few more
kernels between the blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

VARIANTS = 64
"""Most compiled forms of one function, which all networks of a process may share."""
UNITS = 2**24
"""A random float32 in [0, 1) is a multiple of 1 / UNITS."""


def compile_blocks(network: nn.Module, **options: Any) -> nn.Module:
    """Compile a network block by block instead of whole, in place.

    Blocks that are alike share their code (`repeated_blocks`), even where their drop path rises
    from one to the next. What lies between them is compiled in pieces that are as large as
    possible. Copies of the network are not compiled, and names and weights stay as they are. Where
    kernel launches are the limit, `torch.cuda.make_graphed_callables` records the result as two
    CUDA graphs, forward and backward.

    Args:
        options: Keywords of `torch.compile`.

    Returns:
        The network.
    """
    allow_variants()
    _share_drop_paths(network)
    blocks = repeated_blocks(network)
    for part in [*blocks, *_between(network, set(blocks))]:
        part.compile(**{"dynamic": False, **options})
    return network


def allow_variants() -> None:
    """Allow one function many compiled forms; torch gives up after 8 without a word."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Find the blocks of the outermost lists of modules of one type, some of them of one size."""
    found: list[nn.Module] = []
    for child in network.children():
        row = list(child) if isinstance(child, (nn.Sequential, nn.ModuleList)) else []
        sizes = {tuple(p.shape for p in one.parameters()) for one in row}
        alike = len({type(one) for one in row}) == 1 and len(sizes) < len(row)
        found += row if alike else repeated_blocks(child)
    return found


@contextmanager
def as_written(*networks: nn.Module) -> Iterator[None]:
    """Within this context the parts of networks run as they are written, compiled or not.

    It is for what has other shapes than training: each of them would be compiled anew.
    """
    parts = [part for network in networks for part in network.modules()]
    compiled = [(part, part._compiled_call_impl) for part in parts if part._compiled_call_impl]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, code in compiled:
            part._compiled_call_impl = code


def _share_drop_paths(network: nn.Module) -> None:
    for part in list(network.modules()):
        for name, child in part.named_children():
            if type(child) is DropPath and child.drop_prob > 0:
                device = next(network.parameters()).device
                shared = SharedDropPath(child.drop_prob, child.scale_by_keep)
                setattr(part, name, shared.to(device).train(child.training))


def _between(network: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the largest parts with weights that neither contain a block nor lie in one."""
    for child in network.children():
        if child in blocks:
            continue
        if not blocks.isdisjoint(child.modules()):
            yield from _between(child, blocks)
        elif next(child.parameters(), None) is not None:
            yield child


class SharedDropPath(DropPath):
    """timm's drop path, whose rate compiled code reads from a buffer instead of as a constant.

    The buffer holds the share that is kept as an integer, in `UNITS`, which casts to 16 bits leave
    alone. After a change of `drop_prob`, call `init_non_persistent_buffers`.
    """

    keep: Tensor

    def __init__(self, drop_prob: float, scale_by_keep: bool = True):
        super().__init__(drop_prob, scale_by_keep)
        self.register_buffer("keep", torch.empty((), dtype=torch.int32), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffer from `drop_prob`."""
        self.keep.fill_(round(UNITS * (1 - self.drop_prob)))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.compiler.is_compiling()):
            return super().forward(x)
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        scale = UNITS * torch.rand(shape, device=x.device) < self.keep
        if self.scale_by_keep:
            scale = scale * (UNITS / self.keep.clamp(min=1))
        return x * scale.to(x.dtype)
