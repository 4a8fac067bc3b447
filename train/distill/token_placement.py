"""Teachers of tokens whose weights are cut over ranks (`place=shard`), as those of images are.

What is no block (embedding, head, last norm) stays whole: the head is read as a parameter.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn

from zoo.language.tokens import Tokens
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.distill.placement import LEAST, unsharded
from zoo.train.mesh import world
from zoo.train.shard import is_cut, mesh_of, units

if TYPE_CHECKING:  # seconds to import, which no other run needs
    from torch.distributed.device_mesh import DeviceMesh

    from zoo.train.distill.token_config import DistillText


def check_tower(spec: str, model: nn.Module) -> None:
    """Refuse to cut a model that is not made of blocks with weights of their own.

    Raises:
        ValueError: it is not, or its blocks hold numbers that are not floats.
    """
    seen: set[nn.Parameter] = set()
    for block in units(model):
        own = set(block.parameters())
        if own & seen or not all(p.is_floating_point() for p in own):
            what = "share weights" if own & seen else "hold quantised weights"
            raise ValueError(
                f"The teacher {spec} has blocks that {what}, which FSDP2 cannot cut; leave out "
                "place=shard."
            )
        seen |= own
    held, whole = (sum(p.nbytes for p in some) for some in (seen, model.parameters()))
    if held <= LEAST * whole:
        raise ValueError(
            f"The teacher {spec} has repeated blocks that hold {held / whole:.0%} of its weights: "
            "there is little to cut over the processes. Leave out place=shard."
        )


def block_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of each block that can be cut."""
    return [sum(p.nbytes for p in block.parameters()) for block in units(model)]


@torch.no_grad()
def shard_tower(teacher: LanguageTeacher, mesh: "DeviceMesh") -> None:
    """Cut the blocks of a teacher over a mesh, in place; every rank calls this.

    From here on all ranks of the mesh must run the teacher at the same times, but within `whole`.
    """
    from torch.distributed.fsdp import fully_shard

    for block in units(teacher.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # not the model: transformers knows what to record of a model by its class, which this changes
    fully_shard(
        teacher, mesh=mesh, ignored_params={p for p in teacher.parameters() if not is_cut(p)}
    )
    one = torch.zeros(1, 1, dtype=torch.long, device=next(teacher.parameters()).device)
    teacher(Tokens(one, one))  # says which is the root


def cut_teachers(
    config: "DistillText", teachers: Mapping[str, LanguageTeacher], device: torch.device
) -> None:
    """Cut those teachers over the ranks of a node that are to be, in place; every rank calls this.

    On one process they stay whole, which is said.
    """
    specs = dict(zip(config.labels, config.specs, strict=True))
    cut = {label: spec for label, spec in specs.items() if spec.place == "shard"}
    mesh = mesh_of("hsdp", device) if cut and world() > 1 else None
    for label, spec in cut.items():
        if mesh is None:
            print(f"{spec.name}: there is one process, so place=shard leaves it whole.")
        else:
            shard_tower(teachers[label], mesh)


def whole(teachers: Mapping[str, LanguageTeacher]) -> AbstractContextManager[None]:
    """Return the context in which a rank may run teachers alone; every rank enters it."""
    blocks = (block for teacher in teachers.values() for block in units(teacher.model))
    return unsharded([block for block in blocks if any(map(is_cut, block.parameters()))])
