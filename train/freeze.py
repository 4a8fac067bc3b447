"""Keep a part of a model as it is, while the rest learns."""

from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

from timm.models import group_parameters
from torch import nn


def freeze(model: nn.Module, what: str) -> None:
    """Freeze parts of a model's trunk, which is its `backbone` if it has one; in place.

    They get no gradients, and stay in evaluation mode whatever `train()` says: running statistics,
    power iterations and stochastic depth are training too.

    Args:
        what: `trunk` for all of it (then only heads learn); a number N for the stem and the first N
            blocks, as timm's `group_matcher` counts them; or names of parts with commas between.

    Raises:
        ValueError: there is no such part, or fewer blocks.
    """
    trunk: Any = getattr(model, "backbone", model)
    if what == "trunk":
        if trunk is model:
            raise ValueError(
                "optim.freeze trunk leaves the heads to learn, and this model has none beside its "
                "trunk; give a number of blocks, or names."
            )
        names = {name for name, _ in trunk.named_parameters()}
    elif what.isdecimal():
        names = _first_blocks(trunk, int(what))
    else:
        names = _below(trunk, what.split(","))
    for name, parameter in trunk.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    for part in trunk.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.train = MethodType(_stay, part)
            part.eval()


def _stay(part: nn.Module, mode: bool = True) -> nn.Module:
    return type(part).train(part, False)


def _first_blocks(trunk: Any, count: int) -> set[str]:
    if not hasattr(trunk, "group_matcher"):
        raise ValueError(
            "This trunk does not count its blocks (timm's group_matcher); give optim.freeze names."
        )
    matcher = trunk.group_matcher(coarse=False)
    numbers: dict[str, int] = cast(Any, group_parameters(trunk, matcher, reverse=True))
    last = max(numbers.values())
    if not 1 <= count <= last:
        raise ValueError(
            f"optim.freeze is {count}, and the trunk has {last} blocks behind its stem; give 1 to "
            f"{last}, or trunk for all of it."
        )
    return {name for name, number in numbers.items() if number <= count}


def _below(trunk: nn.Module, parts: Iterable[str]) -> set[str]:
    found: set[str] = set()
    known = [name for name, _ in trunk.named_parameters()]
    for part in parts:
        below = {name for name in known if name == part or name.startswith(f"{part}.")}
        if not below:
            raise ValueError(
                f"optim.freeze names {part!r}, and the trunk has no such part; there are "
                f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in known))}."
            )
        found |= below
    return found
