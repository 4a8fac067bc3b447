"""torch.compile for a network made of blocks that repeat: code for one serves all that are alike.

A whole network takes up to twice as long to compile (docs/speed.md); the price are some more
kernels between the blocks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

VARIANTS = 64
"""Compiled forms of one function: all networks of a process may share the code of one block."""
UNITS = 2**24
"""Steps in which a random float32 from 0 to 1 comes."""


def compile_blocks(network: nn.Module, **options: Any) -> nn.Module:
    """Compile block by block what `torch.compile` would compile whole; in place.

    Blocks that are alike share their code (`repeated_blocks`), also where their drop path rises
    from one to the next. What lies between them is compiled in pieces as large as there are.
    Copies of the network are not compiled, and names and weights stay as they are. Where launching
    is the limit, `torch.cuda.make_graphed_callables` records the result as a CUDA graph each way.

    Args:
        options: Of `torch.compile`.

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
    """Let one function have many compiled forms: torch gives up after 8, in silence."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Find the members of the outermost rows of modules of one kind, some of one size."""
    found: list[nn.Module] = []
    for child in network.children():
        row = list(child) if isinstance(child, (nn.Sequential, nn.ModuleList)) else []
        sizes = {tuple(p.shape for p in one.parameters()) for one in row}
        alike = len({type(one) for one in row}) == 1 and len(sizes) < len(row)
        found += row if alike else repeated_blocks(child)
    return found


def _share_drop_paths(network: nn.Module) -> None:
    for part in list(network.modules()):
        for name, child in part.named_children():
            if type(child) is DropPath and child.drop_prob > 0:
                device = next(network.parameters()).device
                shared = SharedDropPath(child.drop_prob, child.scale_by_keep)
                setattr(part, name, shared.to(device).train(child.training))


def _between(network: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    """Return the largest parts with weights that hold none of the blocks and are in none."""
    for child in network.children():
        if child in blocks:
            continue
        if not blocks.isdisjoint(child.modules()):
            yield from _between(child, blocks)
        elif next(child.parameters(), None) is not None:
            yield child


class SharedDropPath(DropPath):
    """timm's drop path, with a rate that compiled code reads instead of having it written in.

    The share that is kept lies in a buffer, in whole `UNITS`: casts to 16 bits leave those alone.
    Where `drop_prob` is changed later, `init_non_persistent_buffers` tells the compiled code.
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
