"""Rules that judge trajectories on pictures of scenes from above (Hydra-MDP, 2406.06978).

A scene is a square picture of 32 x 32 m, the car at the middle of the lower edge, heading upwards.
Red is what may be hit, green is where one may drive, blue is the car's speed (of `FASTEST`), the
same everywhere. Each rule gives every trajectory of one fixed vocabulary a score in [0, 1], the
teacher's summary [B, K]: `plan-collision`, `plan-drivable`, `plan-ttc`, `plan-comfort`,
`plan-progress`; `plan-human` is what a driver did, as soft targets that add up to 1. They are to be
learnt with `loss=bce` and `loss=cross_entropy`:

    zoo distill custom --data SCENES --teachers rule:plan-human@64,spatial=0,loss=cross_entropy \\
        rule:plan-collision@64,spatial=0,loss=bce ...

The paper's vocabulary is k-means of recorded trajectories, its scores are simulated with other cars
that move, its driver is a person. Here the vocabulary is a grid of speeds and curvatures, nothing
but the car moves, and the driver takes the trajectory that the rules like best.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.features import Features

METRES = 32.0
"""Side of a scene."""
SECONDS, POINTS = 4.0, 20
"""How long a trajectory is, and in how many points."""
FASTEST = 8.0
"""Of the trajectories, in metres a second; the speed that blue = 1 means."""
SPEEDS, CURVATURES, SHARPEST = 8, 17, 0.12
"""Of the vocabulary; the largest curvature in 1 / m."""
RADIUS = 1.0
"""Of the car, which is a disc, in metres."""
LOOKAHEAD = (0.25, 0.5, 0.75, 1.0)
"""Seconds ahead that time to collision looks, along the heading."""
HARDEST, SIDEWAYS = 2.0, 4.0
"""Most acceleration along and across the path that is comfortable, in m / s^2."""
SPREAD = 1.0
"""Of the soft targets around the driver's trajectory, in m^2."""


class Vocabulary(NamedTuple):
    """The trajectories that are judged; distances in metres, x to the right, y ahead."""

    points: Float[Tensor, "K T 2"]
    headings: Float[Tensor, "K T 2"]
    """Unit vectors."""
    speeds: Float[Tensor, " K"]
    curvatures: Float[Tensor, " K"]


@cache
def vocabulary() -> Vocabulary:
    """Return arcs of constant speed and curvature: every speed with every curvature."""
    speed = torch.linspace(FASTEST / SPEEDS, FASTEST, SPEEDS)
    curvature = torch.linspace(-SHARPEST, SHARPEST, CURVATURES)
    speed, curvature = (x.flatten() for x in torch.meshgrid(speed, curvature, indexing="ij"))
    way = speed[:, None] * torch.linspace(SECONDS / POINTS, SECONDS, POINTS)
    angle = curvature[:, None] * way  # clockwise from straight ahead
    half = angle / 2
    chord = way * torch.sinc(half / math.pi)
    points = torch.stack([chord * half.sin(), chord * half.cos()], dim=-1)
    headings = torch.stack([angle.sin(), angle.cos()], dim=-1)
    return Vocabulary(points, headings, speed, curvature)


class Scores(NamedTuple):
    """What the rules say of each trajectory, in [0, 1]."""

    collision: Float[Tensor, "B K"]
    """1 if nothing is hit."""
    drivable: Float[Tensor, "B K"]
    """1 if the car stays where one may drive."""
    ttc: Float[Tensor, "B K"]
    """1 if nothing would be hit within a second, going straight on from any point."""
    comfort: Float[Tensor, "B K"]
    """1 if neither the change of speed nor the bend is hard."""
    progress: Float[Tensor, "B K"]
    """Metres ahead, as a share of the most that is possible without a collision."""

    def total(self) -> Float[Tensor, "B K"]:
        """Return the weighted sum of the paper's section 3.3: NC * DAC * (5 TTC + 2 C + 5 EP)."""
        soft = 5 * self.ttc + 2 * self.comfort + 5 * self.progress
        return self.collision * self.drivable * soft / 12


def judge(scenes: Float[Tensor, "B 3 H W"]) -> Scores:
    """Return the scores of every trajectory in scenes with colours in [0, 1]."""
    return Scores(*(RATINGS[name](scenes) for name in Scores._fields))


def collision(scenes: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
    """Return 1 for trajectories that hit nothing."""
    return (~_touches(_things(scenes), _words(scenes).points)).to(scenes)


def drivable(scenes: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
    """Return 1 for trajectories on which the car stays where one may drive."""
    off = 1 - scenes[:, 1:2].gt(0.5).float()
    off = _near(F.pad(off, (1, 1, 1, 0), value=1.0), scenes.shape[-1])  # behind it is no edge
    return (~_touches(off[..., 1:, 1:-1], _words(scenes).points)).to(scenes)


def time_to_collision(scenes: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
    """Return 1 where nothing is hit, nor would be going straight on from any point."""
    words, ahead = _words(scenes), torch.tensor((0.0, *LOOKAHEAD)).to(scenes)
    steps = ahead[:, None] * words.speeds[:, None, None, None]
    further = words.points[:, :, None] + steps * words.headings[:, :, None]
    return (~_touches(_things(scenes), further.flatten(1, 2))).to(scenes)


def comfort(scenes: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
    """Return 1 where neither the change of speed, within a second, nor the bend is hard."""
    words, speed = _words(scenes), scenes[:, 2].mean((1, 2))[:, None] * FASTEST
    sideways = words.speeds.square() * words.curvatures.abs()
    return (((words.speeds - speed).abs() <= HARDEST) & (sideways <= SIDEWAYS)).to(scenes)


def progress(scenes: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
    """Return metres ahead, as a share of the most that any trajectory may go; 0 for the others."""
    metres = _words(scenes).points[:, -1, 1].clamp_min(0) * collision(scenes) * drivable(scenes)
    return metres / metres.amax(-1, keepdim=True).clamp_min(1e-6)


RATINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "collision": collision,
    "drivable": drivable,
    "ttc": time_to_collision,
    "comfort": comfort,
    "progress": progress,
}


def _words(scenes: Tensor) -> Vocabulary:
    return Vocabulary(*(x.to(scenes) for x in vocabulary()))


def _things(scenes: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    """Return where the middle of the car must not be."""
    return _near((scenes[:, :1] > 0.5).float(), scenes.shape[-1])


def _near(mask: Float[Tensor, "B 1 H W"], side: int) -> Float[Tensor, "B 1 H W"]:
    """Widen a mask by the car's radius."""
    radius = max(1, round(RADIUS * side / METRES))
    wide = 2 * radius + 1  # along and across: a window's cost grows with its area
    along = F.max_pool2d(mask, (wide, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(along, (1, wide), stride=1, padding=(0, radius))


def _touches(mask: Float[Tensor, "B 1 H W"], points: Float[Tensor, "K T 2"]) -> Bool[Tensor, "B K"]:
    """Tell which rows of points touch a mask; outside of the picture it is empty."""
    x = 2 * points[..., 0] / METRES
    y = 1 - 2 * points[..., 1] / METRES
    where = torch.stack([x, y], dim=-1).expand(len(mask), *points.shape)
    values = F.grid_sample(mask, where, mode="nearest", align_corners=False)
    return (values[:, 0] > 0.5).any(-1)


def drive(scenes: Float[Tensor, "B 3 H W"]) -> Tensor:
    """Return the number of the trajectory that the driver takes, [B]: the best by all rules.

    Of equally good ones it is the straightest.
    """
    curvatures = vocabulary().curvatures.to(scenes).abs()
    return (judge(scenes).total() - 1e-3 * curvatures / SHARPEST).argmax(-1)


class Human(nn.Module):
    """Soft targets softmax(-||T_i - T||^2) around the driver's trajectory T, over points (m^2)."""

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        points = vocabulary().points.to(x)
        taken = points[drive(x)]
        distance = (points - taken[:, None]).square().sum(-1).mean(-1)
        return Features((-distance / SPREAD).softmax(-1), None)


class Rule(nn.Module):
    """One of `RATINGS`."""

    def __init__(self, rate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        return Features(self.rate(x), None)


RULES: dict[str, Callable[[], nn.Module]] = {
    "plan-human": Human,
    **{f"plan-{name}": partial(Rule, rate) for name, rate in RATINGS.items()},
}
