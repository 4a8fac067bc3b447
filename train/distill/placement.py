"""Where the weights of teachers stand on several ranks: whole on each, or cut over them.

`place=shard` cuts the repeated blocks of a teacher over the ranks of a node (FSDP2): each keeps its
share and gathers a block's weights when it runs, so that of a large teacher a rank holds little
more than 1 / ranks. Nothing is trained, so nothing else travels; nodes hold copies of each other.
What is no block (patch embedding, position tables, last norm) stays whole.

With a partition the teachers of other slices than a rank's wait on the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.features import Batch
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import Distill
from zoo.train.distill.sizes import frozen
from zoo.train.mesh import world
from zoo.train.shard import is_cut, units

if TYPE_CHECKING:  # seconds to import, which no other run needs
    from torch.distributed.device_mesh import DeviceMesh

LEAST = 0.5
"""Share of a teacher's weights that its blocks hold if cutting them is worth it."""


def sharded(config: Distill) -> list[str]:
    """Return the labels of the teachers that are cut; none on one process."""
    specs = zip(config.labels, config.teachers, strict=True) if world() > 1 else ()
    return [label for label, spec in specs if spec.place == "shard"]


def check_blocks(spec: str, teacher: Teacher) -> None:
    """Refuse to cut a teacher that is not made of blocks.

    Raises:
        ValueError: it has no network, or its weights lie elsewhere, or channels last.
    """
    networks, held = frozen(teacher), sum(teacher_blocks(teacher))
    whole = sum(_bytes(p) for p in networks[0].parameters()) if networks else 0
    if held <= LEAST * whole:
        what = f"repeated blocks hold {held / whole:.0%} of its weights" if whole else "no network"
        raise ValueError(
            f"The teacher {spec} has {what}: there is little to cut over the processes. Leave out "
            "place=shard."
        )
    blocks = units(networks[0].network)
    if not all(p.is_contiguous() for block in blocks for p in block.parameters()):
        raise ValueError(
            f"The teacher {spec} has its weights channels last, which FSDP2 cannot cut; leave out "
            "place=shard."
        )


def teacher_blocks(teacher: Teacher) -> list[int]:
    """Return the bytes of each block that can be cut; all sizes of a teacher share them.

    FSDP2 pads rows to a multiple of the shares; the widths of transformers are one mostly.
    """
    seen: set[nn.Parameter] = set()
    found = []
    for block in (block for network in frozen(teacher)[:1] for block in units(network.network)):
        own = set(block.parameters()) - seen
        seen |= own
        found.append(sum(map(_bytes, own)))
    return found


def away(blocks: Sequence[int], shares: int) -> float:
    """Return the bytes that a rank need not hold of blocks that are cut into shares.

    It holds its share of each, and two of them whole: one that runs, and the next.
    """
    return max(0.0, sum(blocks) * (1 - 1 / shares) - 2 * max(blocks)) if blocks else 0.0


def _bytes(p: nn.Parameter) -> int:
    return p.numel() * p.element_size()


def shard_teacher(teacher: Teacher, mesh: "DeviceMesh") -> None:
    """Cut the blocks of a teacher over a mesh, in place; every rank calls this.

    The networks of a teacher with several sizes go on sharing their weights. From here on all ranks
    of the mesh must run the teacher at the same times, but within `gathered`.
    """
    from torch.distributed.fsdp import fully_shard

    cut: dict[nn.Parameter, nn.Parameter] = {}
    done: list[nn.Module] = []
    for one in frozen(teacher):
        if any(one.network is network for network in done):
            continue
        done.append(one.network)
        places = _places(one.network)
        for block in units(one.network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for module, name, before in places:
            if before in cut:
                setattr(module, name, cut[before])
            elif is_cut(after := getattr(module, name)):
                cut[before] = after
        fully_shard(one, mesh=mesh, ignored_params={p for p in one.parameters() if not is_cut(p)})
        one(Batch(torch.zeros(1, 3, *one.size, device=one.mean.device)))  # says which is the root


def _places(network: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the parameters of a network with the modules and the names that hold them."""
    return [
        (module, name, p)
        for module in network.modules()
        for name, p in module.named_parameters(recurse=False)
    ]


def sizes_here(config: Distill, slices: Sequence[int]) -> set[int]:
    """Return the student's sizes in the slices of a rank; without a partition all that it has."""
    sizes = [group.size for group in config.groups for _ in range(group.slices)]
    return {sizes[index] for index in slices} if sizes else set(config.slice_images)


def idle(config: Distill, slices: Sequence[int]) -> list[str]:
    """Return the labels of the teachers that no slice of a rank has; none without a partition."""
    here = sizes_here(config, slices)
    specs = zip(config.labels, config.teachers, strict=True)
    return [label for label, spec in specs if config.groups and spec.at and spec.at not in here]


def put_away(teachers: Mapping[str, Teacher], labels: Sequence[str]) -> None:
    """Move the teachers that a rank does not run in training to the host, in place."""
    for label in labels:
        if isinstance(teacher := teachers[label], nn.Module):
            teacher.cpu()


@contextmanager
def gathered(
    teachers: Mapping[str, Teacher], away: Sequence[str], device: torch.device
) -> Iterator[None]:
    """Within this context the teachers are whole at their own size, and a rank may run them alone.

    Every rank enters and leaves it.

    Args:
        away: Labels of those that were `put_away` on this rank.
        device: Where they run.
    """
    for teacher in (teachers[label] for label in away):
        if isinstance(teacher, nn.Module):
            teacher.to(device)
    blocks = [
        block
        for teacher in teachers.values()
        for network in frozen(teacher)[:1]
        for block in units(network.network)
        if any(map(is_cut, block.parameters()))
    ]
    try:
        with unsharded(blocks):
            yield
    finally:
        put_away(teachers, away)


@contextmanager
def unsharded(blocks: Sequence[Any]) -> Iterator[None]:
    """Within this context blocks that are cut are whole; every rank enters and leaves it."""
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(True)
