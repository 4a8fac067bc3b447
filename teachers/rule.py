"""Teachers that are a formula instead of a network: `rule:NAME[@resolution]`.

They need no weights and cost next to nothing: a target to learn where nothing can be downloaded,
and a known one for tests of the engine.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Features
from zoo.teachers import planning
from zoo.teachers.name import TeacherName, unknown_name
from zoo.teachers.teacher import Frozen, check_patches

SIZE, CELL = 224, 16
"""Side of the images, if the name has no resolution, and side of a cell, in pixels."""


def _cells(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w C"]:
    return F.avg_pool2d(x, CELL).permute(0, 2, 3, 1)


class Colour(nn.Module):
    """Mean and standard deviation of the three colours in each cell, and in the whole image."""

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        mean, square = _cells(x), _cells(x.square())
        spatial = _mean_and_std(mean, square)
        return Features(_mean_and_std(mean.mean((1, 2)), square.mean((1, 2))), spatial)


def _mean_and_std(mean: Tensor, square: Tensor) -> Tensor:
    # rounding may make the variance of a flat cell negative
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], dim=-1)


class Edges(nn.Module):
    """Strength of the edges by their orientation, in each cell and in the whole image.

    Oriented gradients as in Dalal and Triggs (CVPR 2005), without their overlapping blocks: each
    pixel's gradient is shared between the two nearest of eight orientations.
    """

    bins = 8

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        grey = F.pad(x.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
        down = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
        strength = (across.square() + down.square()).sqrt()
        orientation = torch.atan2(down, across).remainder(math.pi) * (self.bins / math.pi)
        bins = torch.arange(self.bins, device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
        distance = (orientation - bins).abs()
        distance = torch.minimum(distance, self.bins - distance)  # orientations are a circle
        spatial = _cells(strength * (1 - distance).clamp(min=0))
        return Features(spatial.mean((1, 2)), spatial)


RULES: dict[str, Callable[[], nn.Module]] = {"colour": Colour, "edges": Edges, **planning.RULES}


class RuleTeacher(Frozen):
    """One of `RULES`, on images in [0, 1]."""

    def features(self, x) -> Features:
        return self.network(x)


def open_rule(name: TeacherName, device: torch.device) -> RuleTeacher:
    """Build a rule; its cells have 16 x 16 pixels at any resolution.

    Raises:
        ValueError: there is no such rule, weights were named, or the cells do not tile the image.
    """
    if name.name not in RULES:
        raise unknown_name(name.name, list(RULES), "rule")
    if name.weights:
        raise ValueError(f"rule:{name.name} has no weights; leave out /{name.weights}.")
    check_patches(name, CELL)
    side = name.resolution or SIZE
    return RuleTeacher(
        f"rule:{name.name}",
        RULES[name.name](),
        size=(side, side),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        license="none needed",
        device=device,
    )
