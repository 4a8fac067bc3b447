"""The deploy form of a model: norms folded, constants computed once."""

import copy

from torch import nn


def deploy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for inference, in which every part with a method `fuse` is fused.

    Batch norms are folded into their convolutions and position biases are kept instead of
    computed. The copy returns the same outputs up to rounding, is in eval mode and not for
    training; `model` itself stays as it is.
    """
    model = copy.deepcopy(model).eval()
    for part in list(model.modules()):
        fuse = getattr(part, "fuse", None)
        if callable(fuse) and part is not model:
            fuse()
    return model
