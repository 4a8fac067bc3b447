"""A cut model on the meta device: whether its library has it, before anything is computed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.axes import Axis, Shapes, State, dim_size
from zoo.students.prune.cut import keep_layers
from zoo.students.prune.library import (
    Kept,
    NotExpressible,
    Parent,
    check_tensors,
    express,
    rebuilt,
    reshaped,
)
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import choose_layers

RankLayers = Callable[[str, int], Tensor]


def outline(
    parent: Parent,
    shapes: Shapes,
    plan: Plan,
    rank_layers: RankLayers | None = None,
    form: str = "library",
    device: str = "meta",
) -> nn.Module:
    """Build what a plan makes of a parent without its numbers.

    Args:
        shapes: The parent's.
        form: As for `prune`.
        device: A real one for a model that can be timed; its numbers mean nothing.

    Raises:
        NotExpressible: the library cannot build it.
    """
    sizes = {**shapes.sizes, **plan.sizes(shapes)}
    layers = choose_layers(shapes, plan, rank_layers)
    after = replace(shapes, sizes=sizes)
    if form == "library":
        child = express(parent, shapes, after, layers)
        check_tensors(child.model, tensors(parent, shapes, sizes, layers, "meta"))
        model = child.model if device == "meta" else rebuilt(child).to(device)
        return model.to(next(parent.model.parameters()).dtype).eval()
    try:
        state = tensors(parent, shapes, sizes, layers, device)
        return reshaped(parent, shapes, after, layers, state).model
    except ValueError as error:
        raise NotExpressible(str(error)) from error


def tensors(
    parent: Parent, shapes: Shapes, sizes: dict[Axis, int], layers: Kept, device: str
) -> State:
    """Make a state dict as a child has it, of zeros."""
    own = parent.model.state_dict()
    state: State = {}
    for name, shape in shapes.tensors.items():
        lengths = [dim_size(dim, sizes) for dim in shape.dims]
        state[name] = torch.zeros(lengths, dtype=own[name].dtype, device=device)
    state |= {name: state[first] for name, first in shapes.tied.items()}
    for path, kept in layers.items():
        state = keep_layers(shapes, state, path, kept)
    return state


def sample_of(parent: Parent) -> dict[str, Any] | None:
    """Make one image as a model takes it, on the meta device; None if it takes something else.

    Of a model of images and text the parent's own sample, an image with its text.
    """
    model: Any = parent.model
    if parent.sample is not None:
        return {key: x.to("meta") for key, x in parent.sample.items()}
    dtype = next(model.parameters()).dtype
    if parent.name:
        config = model.pretrained_cfg
        embed = getattr(model, "patch_embed", None)
        side = getattr(embed, "img_size", None) or config["input_size"][1:]
        return {"x": torch.empty(1, 3, *side, dtype=dtype, device="meta")}
    if model.main_input_name == "pixel_values" and hasattr(model.config, "image_size"):
        side = model.config.image_size
        return {"pixel_values": torch.empty(1, 3, side, side, dtype=dtype, device="meta")}
    return None
