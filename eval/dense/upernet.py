"""UPerNet (1807.10221): pooled context and a feature pyramid, then all levels in one map."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, at_grid

LEVELS = 4
STEPS = (4.0, 2.0, 1.0, 0.5)
"""Factors by which the maps of a plain backbone are resized: patches of 16 px become strides 4, 8,
16 and 32."""


class BackbonePyramid:
    """A batch -> four maps of a backbone, fine to coarse, [B C h w] each.

    Of a hierarchy these are the last four stages. Of a plain backbone, whose blocks share one grid,
    they are the maps after each quarter of its blocks, resized to a pyramid.
    """

    def __init__(self, backbone: Any, mean: Tensor, std: Tensor):
        self.backbone, self.mean, self.std = backbone, mean, std
        info = backbone.feature_info
        strides = [level["reduction"] for level in getattr(info, "info", info)]
        self.plain = len(set(strides)) < LEVELS
        count = len(strides)
        if self.plain:
            self.levels = [max(0, round(count * (i + 1) / LEVELS) - 1) for i in range(LEVELS)]
        else:  # of several levels with the same stride the last
            last = sorted({stride: i for i, stride in enumerate(strides)}.items())
            self.levels = [i for _, i in last[-LEVELS:]]

    def __call__(self, batch: Batch) -> list[Tensor]:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        maps = self.backbone.forward_intermediates(
            (batch.at(size) - self.mean) / self.std,
            indices=sorted(set(self.levels)),
            output_fmt="NCHW",
            intermediates_only=True,
        )
        known = dict(zip(sorted(set(self.levels)), maps, strict=True))
        found = [known[level] for level in self.levels]
        return [_resized(m, s) for m, s in zip(found, STEPS, strict=True)] if self.plain else found


def _resized(x: Float[Tensor, "B C h w"], step: float) -> Tensor:
    grid = (max(1, round(x.shape[2] * step)), max(1, round(x.shape[3] * step)))
    return _at(x, grid)


def _at(x: Float[Tensor, "B C h w"], grid: tuple[int, int]) -> Float[Tensor, "B C y x"]:
    """Resize a channels-first map by `at_grid`, whose gradient is deterministic."""
    return at_grid(x.permute(0, 2, 3, 1), grid).permute(0, 3, 1, 2)


class ConvNormRelu(nn.Sequential):
    """A convolution that keeps the size, then batch norm and ReLU."""

    def __init__(self, width: int, out: int, kernel: int):
        super().__init__(
            nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )


class UPerNet(nn.Module):
    """Four maps [B C h w], fine to coarse -> [B h w classes] on the grid of the finest map.

    Args:
        widths: Channels of the maps.
        hidden: Channels of all inner maps.
        pools: Sides of the grids to which the coarsest map is pooled, in cells.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        *,
        hidden: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
    ):
        super().__init__()
        self.pools = tuple(pools)
        self.context = nn.ModuleList(ConvNormRelu(widths[-1], hidden, 1) for _ in pools)
        self.top = ConvNormRelu(widths[-1] + len(pools) * hidden, hidden, 3)
        self.lateral = nn.ModuleList(ConvNormRelu(width, hidden, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(ConvNormRelu(hidden, hidden, 3) for _ in widths[:-1])
        self.join = ConvNormRelu(len(widths) * hidden, hidden, 3)
        self.classifier = nn.Conv2d(hidden, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "B h w K"]:
        maps = [level.float() for level in maps]
        last = maps[-1]
        grid = (last.shape[2], last.shape[3])
        pooled = [
            _at(part(F.adaptive_avg_pool2d(last, pool)), grid)
            for part, pool in zip(self.context, self.pools, strict=True)
        ]
        down = [self.top(torch.cat([last, *pooled], dim=1))]
        for part, level in zip(reversed(self.lateral), reversed(maps[:-1]), strict=True):
            down.append(part(level) + _at(down[-1], (level.shape[2], level.shape[3])))
        fine = (maps[0].shape[2], maps[0].shape[3])
        out = [part(level) for part, level in zip(self.smooth, reversed(down[1:]), strict=True)]
        joined = torch.cat([_at(level, fine) for level in (*out, down[0])], dim=1)
        return self.classifier(self.join(joined)).permute(0, 2, 3, 1)
