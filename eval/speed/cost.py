"""Models by a name with options, for random weights alone; their parameters and multiply-adds."""

import ast
import functools
from typing import Any

import torch
from torch import nn

import zoo
from zoo.flops import total_flops


def name_and_options(model: str) -> tuple[str, dict[str, Any]]:
    """Split `NAME,key=value,...` into the name and the keywords of `timm.create_model`.

    Raises:
        ValueError: the options are not written as Python's keyword arguments.
    """
    name, _, rest = model.partition(",")
    try:
        call = ast.parse(f"_({rest})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or None in {k.arg for k in call.keywords}:
            raise SyntaxError
        return name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"The options of {model!r} cannot be read; write NAME,window_size=8,drop_rate=0.1."
        ) from None


def build(model: str, size: int, device: str | torch.device) -> nn.Module:
    """Build a model with random weights, the same on each call, for square images of `size` pixels.

    Models that can be fitted to a size (`set_input_size`) are, unless it is their default or their
    options set a window.
    """
    name, options = name_and_options(model)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        made: Any = zoo.create_model(name, **options)
    default = (getattr(made, "pretrained_cfg", None) or {}).get("input_size", (0,))[-1]
    fitted = size == default or not {"img_size", "window_size"}.isdisjoint(options)
    if not fitted and hasattr(made, "set_input_size"):
        fit: Any = made.set_input_size
        fit(img_size=size)
    return made.eval()


@functools.lru_cache(maxsize=64)
def cost(model: str, size: int) -> tuple[int, float]:
    """Return the parameters, and the multiply-adds of one image, counted on the meta device.

    torch's flop counter counts convolutions and matrix products, including those of attention.
    """
    built = build(model, size, "meta")
    image = torch.zeros(1, 3, size, size, device="meta")
    flops = total_flops(lambda: built(image), built)
    return sum(p.numel() for p in built.parameters()), flops / 2


def known_cost(model: str, size: int) -> tuple[int, float] | None:
    """Return `cost`, or `None` where it cannot be counted.

    An operator has no meta form, or the network refuses images of that size, each library by an
    error of its own.
    """
    try:
        return cost(model, size)
    except (RuntimeError, NotImplementedError, ValueError, AssertionError):
        return None
