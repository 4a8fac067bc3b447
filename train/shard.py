"""Weights cut over the ranks (FSDP2): each keeps its share, and gathers a block's when it runs.

Which method: `ddp`, a whole copy on each rank; `fsdp`, cut over all ranks; `hsdp`, cut over the
ranks of a node and copied from node to node, so that the large transfers stay within a node.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from zoo.compiled_blocks import repeated_blocks
from zoo.layers.stage import Stage
from zoo.train.mesh import world

if TYPE_CHECKING:  # seconds to import, which no other run needs
    from torch.distributed.device_mesh import DeviceMesh

Method = Literal["ddp", "fsdp", "hsdp"]
LARGE = 10**9
"""Parameters from which `auto` cuts a model up."""
ENTRY = "own_map"
"""The method of a student that MESA's average runs without `__call__`."""


def method_of(ranks: str, model: nn.Module, processes: int | None = None) -> Method:
    """Settle `auto`: DDP below 10⁹ parameters, HSDP from there on; over the ranks there are."""
    if ranks == "auto":
        large = sum(p.numel() for p in model.parameters()) >= LARGE
        return "hsdp" if large and (processes or world()) > 1 else "ddp"
    return ranks  # pyright: ignore[reportReturnType]


def shares(ranks: str, model: nn.Module) -> int:
    """Return into how many shares the weights are cut."""
    method = method_of(ranks, model)
    if method == "ddp":
        return 1
    return world() if method == "fsdp" else of_node()


def of_node() -> int:
    """Return how many ranks stand on a node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def mesh_of(method: Method, device: torch.device) -> "DeviceMesh":
    """Return the ranks in a row, or for HSDP nodes by ranks of a node."""
    from torch.distributed.device_mesh import init_device_mesh

    local = of_node()
    if method == "hsdp" and 1 < local < world():
        shape, names = (world() // local, local), ("replicate", "shard")
    else:
        shape, names = (world(),), ("shard",)
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shard(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Cut a model's parameters over a mesh in place, one group for each repeated block."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in [*units(model), model]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if hasattr(model, ENTRY):
        register_fsdp_forward_method(model, ENTRY)


def units(model: nn.Module) -> list[nn.Module]:
    """Return what is gathered at once: blocks, or a stage that reads its blocks' weights itself.

    The step to the next stage lies in a `Stage`, and is not run by it.
    """
    stages = [
        part
        for part in model.modules()
        if isinstance(part, Stage) and type(part).extra_inputs is not Stage.extra_inputs
    ]
    inside = {part for stage in stages for part in stage.modules()}
    steps = [stage.downsample for stage in stages if list(stage.downsample.parameters())]
    return [*steps, *stages, *(block for block in repeated_blocks(model) if block not in inside)]


def unit_sizes(model: nn.Module, shares: int) -> list[int]:
    """Return how many numbers travel of each group that `shard` makes; what is left is the last.

    FSDP2 pads the first dim of each parameter to a multiple of the shares it is cut into, which a
    position table of shape (1, N, C) makes large.
    """
    seen: set[nn.Parameter] = set()
    sizes = []
    for unit in [*units(model), model]:
        own = set(unit.parameters()) - seen
        seen |= own
        rows = [(len(p), p.numel() // len(p)) if p.ndim else (1, 1) for p in own]
        sizes += [sum(-(-n // shares) * shares * width for n, width in rows)] if own else []
    return sizes


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model's parameters are cut over ranks."""
    return any(is_cut(p) for p in model.parameters())


def is_cut(x: Tensor) -> bool:
    """Tell whether a tensor is cut over ranks: a DTensor."""
    return hasattr(x, "to_local")


def local(x: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    return x.to_local() if is_cut(x) else x


def whole(x: Any) -> Tensor:
    """Return a tensor whole; every rank calls this."""
    return x.full_tensor() if is_cut(x) else x


def cut_like(x: Tensor, like: Any) -> Tensor:
    """Cut a tensor that is whole and equal on all ranks as another one is."""
    if not is_cut(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Clip gradients by the norm of all of them, and return it; some or all may be cut."""
    cut, plain = ([p for p in parameters if is_cut(p) == kind] for kind in (True, False))
    if not (cut and plain):
        return whole(clip_grad_norm_(parameters, largest))
    norms = [
        whole(get_total_norm([p.grad for p in some if p.grad is not None])) for some in (cut, plain)
    ]
    norm = torch.stack(norms).norm()
    for some in (cut, plain):  # torch's kernels do not take both kinds at once
        clip_grads_with_norm_(some, largest, norm)
    return norm


@torch.no_grad()
def filled(skeleton: Any, model: nn.Module) -> Any:
    """Write the whole weights of a model that is cut into a plain one; every rank calls this.

    Args:
        skeleton: Has the same parameters, uncut; None on a rank that only lends its share.
    """
    target = skeleton.state_dict() if skeleton is not None else {}
    for name, value in model.state_dict().items():
        value = whole(value)
        if name in target:
            target[name].copy_(value)
    return skeleton
