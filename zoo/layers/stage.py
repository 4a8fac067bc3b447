"""Stages and blocks that several families share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, LayerScale, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from zoo.layers.checkpointed import checkpointed
from zoo.layers.conv import ConvNorm
from zoo.layers.gelu import GELU


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop path of each block of each stage: from 0, linearly, to `rate` at the last."""
    rates = calculate_drop_path_rates(rate, list(depths), stagewise=True)
    return cast(list[list[float]], rates)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with a residual; in training on a GPU its output may come padded."""

    def __init__(self, dim: int, drop_path: float, *, act: Callable[[], nn.Module]):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, bias=True, act=act)
        self.conv2 = ConvNorm(dim, dim, bias=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        x, plus = self.conv1(x, keep_padding=True), x
        return self.conv2(x, plus=plus, drop_path=self.drop_path, keep_padding=True)


class MixerBlock(nn.Module):
    """Pre-norm token mixer and MLP, each with a scale for its channels.

    Args:
        mixer: Called with the tokens and the block's further inputs (a position bias, ...).
        layer_scale: First value of the scales; `None` for none.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, layer_scale: float | None, drop_path: float):
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.scale1 = scale()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELU)
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B N C"], *extra: Tensor | None) -> Float[Tensor, "B N C"]:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x), *extra)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Blocks at one resolution, [B C H W] -> [B C H W].

    Args:
        downsample: The step to the next stage, which `Hierarchy` runs; not part of `forward`.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """Return `block(*inputs)`; with `grad_checkpointing`, only the inputs are kept."""
        return checkpointed(block, *inputs) if self.grad_checkpointing else block(*inputs)

    def extra_inputs(self) -> Iterable[Sequence[Tensor]]:
        """Compute the further inputs of each block, beside the map; none by default."""
        return [()] * len(self.blocks)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        chs = x.shape[1]
        for block, extra in zip(self.blocks, self.extra_inputs(), strict=True):
            x = self.run(block, x, *extra)
        padding = x.shape[1] - chs  # convolutions may have padded it
        return F.pad(x, (0, 0, 0, 0, 0, -padding)) if padding else x
