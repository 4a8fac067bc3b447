"""Any timm model as a detector's backbone, and the pyramid that a plain transformer needs.

These are ordinary modules; `zoo.eval.openmmlab.mmdet_plugin` registers them with mmdet.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import LayerNorm2d
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

import zoo

__all__ = ["Backbone", "SimplePyramid"]

STRIDES = (4, 8, 16, 32)
"""The strides of the pyramid that detectors take."""


class Backbone(nn.Module):
    """Images of any size -> maps of a timm model, [B C h w] each, of `channels` and `strides`.

    Images are padded with zeros on the right and below to a size that the model takes, and the
    cells that lie wholly in the padding are removed: a map has ceil(side / stride) cells a side.

    Args:
        name: A registered model with or without its tag, or the folder of an exported student:
            `local-dir:runs/mine/export`.
        pretrained: Load the weights of the tag or the folder.
        out_indices: Levels to return; for a plain transformer, blocks. By default those of strides
            4, 8, 16 and 32, and for a plain transformer the last block.
        frozen_stages: -1 trains all, 0 freezes the stem, k also the first k stages (blocks).
        norm_eval: Keep the running statistics of batch norms.
        drop_path_rate: The model's own by default.
        img_size: Rows and columns to which windows are fitted, if the model fits its windows to
            images (MambaVision: one window covers the map). By default they stay as trained.
        out_norm: Add a new layer norm over the channels after each level, as the published
            detectors of MambaVision do. A plain transformer keeps its own final norm.
        options: Further keywords of `timm.create_model`.

    Raises:
        ValueError: the model has no such levels, returns no maps, or has fewer stages than are to
            be frozen.
    """

    mean: tuple[float, float, float]
    """Mean of the channels, for images in [0, 1], by which inputs must be normalised; see `std`."""

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float | None = None,
        img_size: Sequence[int] | None = None,
        out_norm: bool = True,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model = _build(name, pretrained, drop_path_rate, img_size, dict(options or {}))
        levels = [dict(level) for level in getattr(model.feature_info, "info", model.feature_info)]
        reductions = [level["reduction"] for level in levels]
        self.is_plain = len(set(reductions)) == 1
        """Whether all levels have one stride, as in a plain vision transformer."""
        self.out_indices = _indices(name, reductions, out_indices)
        self.strides = tuple(reductions[i] for i in self.out_indices)
        self.channels = tuple(levels[i]["num_chs"] for i in self.out_indices)
        self.step = math.lcm(*(int(r) for r in reductions), getattr(model, "resolution_step", 1))
        config = resolve_model_data_config(model)
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=not self.is_plain)
        self.norms = nn.ModuleList(
            LayerNorm2d(c) if out_norm and not self.is_plain else nn.Identity()
            for c in self.channels
        )
        self.norm_eval = norm_eval
        self.frozen = self._freeze(name, frozen_stages)
        self.train()

    def _freeze(self, name: str, stages: int) -> list[str]:
        """Freeze the stem and the first stages; return the names of their modules."""
        if stages < 0:
            return []
        matcher = self.model.group_matcher(coarse=True)
        weights = group_with_matcher(self.model.named_parameters(), matcher, return_values=True)
        parts = group_with_matcher(self.model.named_modules(), matcher)
        if stages >= len(weights):
            raise ValueError(
                f"{name} has {len(weights) - 1} stages here; frozen_stages {stages} is too many."
            )
        for i in range(stages + 1):
            for weight in weights[i]:
                weight.requires_grad_(False)
        return [part for i in range(stages + 1) for part in parts[i]]

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        parts = dict(self.model.named_modules())
        still = [parts[key] for key in self.frozen]
        if self.norm_eval:
            still += [p for p in parts.values() if isinstance(p, nn.modules.batchnorm._BatchNorm)]
        for part in still:
            part.training = False
        return self

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        rows, cols = x.shape[-2:]
        below, right = -rows % self.step, -cols % self.step
        maps = self.model.forward_intermediates(
            F.pad(x, (0, right, 0, below)) if below or right else x,
            indices=list(self.out_indices),
            norm=self.is_plain,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return tuple(
            norm(level[..., : math.ceil(rows / stride), : math.ceil(cols / stride)])
            for norm, level, stride in zip(self.norms, maps, self.strides, strict=True)
        )


def _build(
    name: str,
    pretrained: bool,
    drop_path_rate: float | None,
    img_size: Sequence[int] | None,
    options: dict[str, Any],
) -> Any:
    options |= dict(num_classes=0)
    if drop_path_rate is not None:
        options["drop_path_rate"] = drop_path_rate
    if img_size is not None:
        options["img_size"] = tuple(img_size)
    with torch.device("meta"):
        plan: Any = zoo.create_model(name, **options)
    if not hasattr(plan, "forward_intermediates"):
        raise ValueError(f"{name} returns no maps: timm has no forward_intermediates for it.")
    if getattr(plan, "dynamic_img_size", True) is False:  # timm's ViTs have a fixed size by default
        options["dynamic_img_size"] = True
    return zoo.create_model(name, pretrained, **options)


def _indices(
    name: str, reductions: list[int], out_indices: Sequence[int] | None
) -> tuple[int, ...]:
    count = len(reductions)
    if out_indices is not None:
        indices = sorted({i + count if i < 0 else i for i in out_indices})
        if not indices or indices[0] < 0 or indices[-1] >= count:
            raise ValueError(f"{name} has levels 0 to {count - 1}, not {list(out_indices)}.")
        return tuple(indices)
    if len(set(reductions)) == 1:
        return (count - 1,)
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ValueError(
            f"{name} has no level of stride {missing[0]}: its strides are {reductions}. Choose "
            "levels with out_indices."
        )
    return tuple(reductions.index(stride) for stride in STRIDES)


class SimplePyramid(nn.Module):
    """Make a pyramid of the one map of a plain transformer (ViTDet, 2203.16527, section 3).

    Each level is computed from that map alone: by transposed convolutions to finer strides or a
    maximum to coarser ones, then a 1x1 and a 3x3 convolution.

    Args:
        strides: Strides of the levels: `stride` times a power of two, at least `stride` / 4.
        stride: Stride of the input map.

    Raises:
        ValueError: a level's stride is not `stride` times a power of two, or is below a quarter.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        *,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        stride: int = 16,
    ):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                *_resampled(in_channels, level, stride),
                nn.Conv2d(_width(in_channels, level, stride), out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for level in strides
        )

    def forward(self, maps: Sequence[Float[Tensor, "B C h w"]]) -> tuple[Tensor, ...]:
        (x,) = maps
        return tuple(level(x) for level in self.levels)


def _width(dim: int, level: int, stride: int) -> int:
    return dim * level // stride if level < stride else dim


def _resampled(dim: int, level: int, stride: int) -> list[nn.Module]:
    """Return the layers from stride `stride` to `level`; each refinement halves the channels."""
    if level == stride:
        return []
    if 4 * level == stride:
        first = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        second = nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)
        return [first, LayerNorm2d(dim // 2), nn.GELU(), second]
    if 2 * level == stride:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
    ratio = level // stride
    if level < stride or level % stride or ratio & (ratio - 1):
        raise ValueError(
            f"A level of stride {level} cannot be made of a map of stride {stride}; from "
            f"{stride // 4}, {stride // 2}, {stride}, {2 * stride} upwards in doublings it can."
        )
    return [nn.MaxPool2d(ratio, ceil_mode=True)]
