"""Which layers matter: block influence, how much a layer turns what passes through it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block_influence(model: nn.Module, path: str, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Score the layers of a list by one minus the cosine between a layer's input and output.

    ShortGPT's block influence, as Minitron (2407.14679, table 1.1 there) uses it. Independent
    scores say little about the joint removal of several layers.

    Raises:
        ValueError: there are no batches, or no layer of the list ran.
    """
    layers: Any = model.get_submodule(path)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    counts = torch.zeros(len(layers), dtype=torch.float64)

    def watch(i: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            del layer
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if before.shape != after.shape:  # a step to another width: it cannot go
                sums[i], counts[i] = torch.inf, 1
                return
            channels = 1 if before.ndim == 4 and path.startswith("stages") else -1
            turned = 1 - F.cosine_similarity(before.double(), after.double(), dim=channels)
            sums[i] += turned.sum().item()
            counts[i] += turned.numel()

        return hook

    hooks = [
        layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not counts.all():
        raise ValueError(f"Not every layer of {path} ran on this data; are there samples?")
    return sums / counts
