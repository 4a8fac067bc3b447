"""Four maps from the one map of a plain ViT."""

from typing import cast

from jaxtyping import Float
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """Make maps of strides 4, 8, 16 and 32 from a ViT's last map, of stride 16.

    ViTDet (2203.16527 section 3): deconvolutions upwards, a pooling downwards, and for each
    level a 1 x 1 and a 3 x 3 convolution to the width of the heads. No lateral connections.

    Args:
        in_dim: Channels of the ViT.
        dim: Channels of every level.
        strides: Which of the four to make.
    """

    all_strides = (4, 8, 16, 32)

    def __init__(self, in_dim: int, dim: int = 256, strides: tuple[int, ...] = all_strides):
        super().__init__()
        half, quarter = in_dim // 2, in_dim // 4
        scaled = (
            nn.Sequential(
                nn.ConvTranspose2d(in_dim, half, 2, 2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ),
            nn.ConvTranspose2d(in_dim, half, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2),
        )
        widths = (quarter, half, in_dim, in_dim)
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width, dim, 1, bias=False),
                LayerNorm2d(dim),
                nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                LayerNorm2d(dim),
            )
            for scale, width, stride in zip(scaled, widths, self.all_strides, strict=True)
            if stride in strides
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Give the maps, finest first."""
        return [cast(Tensor, level(x)) for level in self.levels]
