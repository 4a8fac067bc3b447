"""Adapters of low rank on a student's frozen trunk (LoRA, 2106.09685), as peft makes them.

    W' = W + B A,    A: [rank, in] drawn at random, B: [out, rank] zero at first

They make a big student cheap to train further: gradients, moments and their average are those of A
and B alone. Before the export they are added to the weights.
"""

import re
from collections.abc import Iterable

import torch
from torch import nn

from zoo.features import Batch
from zoo.students.student import Student


def add_adapters(student: Student, rank: int, layers: Iterable[str] = ()) -> None:
    """Freeze the backbone and give its linear layers adapters, in place; the heads learn as before.

    Adapters are scaled by 1 (peft's alpha is the rank).

    Args:
        layers: The ends of their names, such as `qkv` or `mlp.fc1`; by default all that are called.
            A layer whose weight is only read, as the kernels of some families do, would go round
            its adapter.

    Raises:
        ValueError: peft is missing, or there is no such layer, or it goes round its adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(
            "optim.lora needs peft, which the extra lora installs: pip install 'backbone-zoo[lora]'"
        ) from None
    called, linears = _called(student), _linears(student.backbone)
    chosen = dict.fromkeys(name for name in linears if name in called)
    for end in layers:
        found = [name for name in linears if f".{name}".endswith(f".{end}")]
        passive = [name for name in found if name not in called]
        if not found or passive:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
            wrong = f"does not run {passive[0]} as a layer" if passive else "has no such layer"
            raise ValueError(
                f"optim.lora_layers names {end!r}, and the student {wrong}; there are {known}."
            )
    ends = tuple(f".{end}" for end in layers)
    names = [name for name in chosen if not ends or f".{name}".endswith(ends)]
    if not names:
        raise ValueError("optim.lora finds no linear layer in the student's backbone.")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names)))
    inject_adapter_in_model(config, student.backbone)


def _linears(backbone: nn.Module) -> list[str]:
    return [name for name, part in backbone.named_modules() if isinstance(part, nn.Linear)]


@torch.no_grad()
def _called(student: Student) -> set[str]:
    """Name the linear layers of the backbone that run as layers, on a black image."""
    called: set[str] = set()
    linears = [(n, student.backbone.get_submodule(n)) for n in _linears(student.backbone)]
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in linears
    ]
    training = student.training
    try:
        device = student.backbone.get_parameter(next(iter(student.backbone.state_dict()))).device
        student.eval().features(Batch(torch.zeros(1, 3, *student.size, device=device)))
    finally:
        student.train(training)
        for hook in hooks:
            hook.remove()
    return called


def add_language_adapters(tower: nn.Module, rank: int, layers: Iterable[str] = ()) -> None:
    """Freeze a language model of transformers and give its linear layers adapters, in place.

    Args:
        layers: The ends of their names, such as `q_proj`; by default all linear ones.

    Raises:
        ValueError: peft is missing, or there is no such layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(
            "optim.lora needs peft, which the extra lora installs: pip install 'backbone-zoo[lora]'"
        ) from None
    linears = _linears(tower)
    ends = tuple(f".{end}" for end in layers)
    names = [name for name in linears if not ends or f".{name}".endswith(ends)]
    for end in ends:
        if not any(f".{name}".endswith(end) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise ValueError(
                f"optim.lora_layers names {end[1:]!r}, and the language model has no such layer; "
                f"there are {known}."
            )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names)))
    tower.requires_grad_(False)
    inject_adapter_in_model(config, tower)
