"""Images a second of modules that no registry knows, by the library's own measurement."""

import copy
import sys
from typing import Any

import timm
import torch
from torch import nn

from zoo.eval.speed.models import Case, Measured, measure

MODES = ("eager", "deploy+compiled")


def images_a_second(
    name: str, model: nn.Module, *, size: int, batch: int, modes: tuple[str, ...], rounds: int
) -> dict[str, Any]:
    """Measure a module in several forms, in bfloat16 with channels last; the best is `best`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register(name, model)
    cases = [
        Case(
            model=name, size=size, batch=batch, mode=mode, precision="bf16", channels_last=True,
            device=device,
        )
        for mode in modes
    ]  # fmt: skip
    rows: list[Measured] = list(measure(cases, rounds=rounds))
    found: dict[str, Any] = {row.case.mode: row.error or round(row.images_per_s, 1) for row in rows}
    return found | dict(best=max(row.images_per_s for row in rows))


def register(name: str, model: nn.Module) -> None:
    """Let `timm.create_model(name)` return copies of a module, on the device at hand."""
    own = copy.deepcopy(model).cpu().eval()

    def entry(pretrained: bool = False, **_: Any) -> nn.Module:
        del pretrained
        return copy.deepcopy(own).to(torch.get_default_device())

    entry.__name__ = name
    entry.__module__ = __name__
    sys.modules[__name__].__dict__[name] = entry
    timm.models.register_model(entry)
