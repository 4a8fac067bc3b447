"""Small teachers that learn from your own images, for runs without any download.

`pretext:classifier` learns classes, `pretext:autoencoder` fills in masked patches and
`pretext:gradients` predicts edges on a finer grid, without a summary. `zoo.train.pretext` trains
them; here are the networks.
"""

import math

import torch
from jaxtyping import Bool, Float
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.features import Features
from zoo.teachers.name import TeacherName, unknown_name
from zoo.teachers.teacher import Frozen
from zoo.weights import read_state

SIZE = 64
"""Side of the images in pixels."""
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _conv(in_chs: int, out_chs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False), nn.BatchNorm2d(out_chs), nn.ReLU()
    )


def _body(widths: tuple[int, ...], strides: tuple[int, ...], depth: int = 1) -> nn.Sequential:
    """Stack convolutions, from 3 channels to each width in turn, `depth` of them at each."""
    layers: list[nn.Module] = []
    for before, width, stride in zip((3, *widths), widths, strides, strict=False):
        layers += [_conv(before, width, stride)]
        layers += [_conv(width, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """Convolutions to stride 8; the summary is the mean of the map.

    Args:
        dim: Channels of map and summary.
        widths: Channels before them.
        depth: Convolutions at each width.
    """

    def __init__(self, dim: int = 128, *, widths: tuple[int, ...] = (24, 48, 96), depth: int = 1):
        super().__init__()
        self.body, self.dim = _body((*widths, dim), (2, 2, 2, 1), depth), dim

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        spatial = self.body(x).permute(0, 2, 3, 1)
        return Features(spatial.mean(dim=(1, 2)), spatial)


class PatchTransformer(nn.Module):
    """A small ViT; the summary is the mean token. With its defaults, it is the autoencoder.

    Args:
        patch: Side of a patch in pixels.
        size: Side of the images in pixels.
    """

    def __init__(
        self,
        dim: int = 96,
        depth: int = 3,
        num_heads: int = 4,
        patch: int = 8,
        *,
        size: int = SIZE,
        mlp_ratio: float = 2.0,
    ):
        super().__init__()
        self.patch, self.dim = patch, dim
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, (size // patch) ** 2, dim))
        self.masked = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        trunc_normal_(self.position, std=0.02)

    def forward(
        self, x: Float[Tensor, "B 3 H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> Features:
        """Return the features of images.

        Args:
            mask: Patches that are replaced by the learnt `masked` token.
        """
        tokens = self.embed(x)
        grid = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.masked, tokens)
        tokens = tokens + self.position
        for block in self.blocks:
            tokens = block(tokens)
        spatial = self.norm(tokens).unflatten(1, grid)
        return Features(spatial.mean(dim=(1, 2)), spatial)


class Gradients(nn.Module):
    """Convolutions to stride 4: a grid twice as fine as the others', and no summary.

    Args:
        dim: Channels of the map.
        widths: Channels before them.
    """

    def __init__(
        self,
        dim: int = 64,
        *,
        widths: tuple[int, ...] = (24, 48),
        strides: tuple[int, ...] = (2, 2, 1),
    ):
        super().__init__()
        self.body, self.stride = _body((*widths, dim), strides), math.prod(strides)
        self.dim = dim

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        return Features(None, self.body(x).permute(0, 2, 3, 1))


NETWORKS = {"classifier": Classifier, "autoencoder": PatchTransformer, "gradients": Gradients}


class PretextTeacher(Frozen):
    """One of `NETWORKS`, trained and frozen."""

    def features(self, x) -> Features:
        return self.network(x)

    def network_at(self, size: tuple[int, int]) -> nn.Module:
        if size != self.size:
            raise ValueError(f"{self.name} takes {self.size[0]} px and no other size.")
        return self.network


def build_network(name: str) -> nn.Module:
    """Build one of `NETWORKS`, untrained.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NETWORKS:
        raise unknown_name(name, list(NETWORKS), "pretext teacher")
    return NETWORKS[name]()


def open_pretext(name: TeacherName, device: torch.device) -> PretextTeacher:
    """Build a pretext teacher from the file of its trained weights.

    Raises:
        ValueError: there is no such network, no file was named, or the resolution is not `SIZE`.
    """
    with torch.device("meta" if device.type == "meta" else "cpu"):
        network = build_network(name.name)
    if name.resolution not in (None, SIZE):
        raise ValueError(f"pretext:{name.name} takes {SIZE} px; leave out @{name.resolution}.")
    if device.type != "meta":
        if name.weights is None:
            raise ValueError(
                f"pretext:{name.name} has no weights of its own: `zoo distill` trains it on your "
                "images; elsewhere name their file, pretext:NAME/PATH."
            )
        network.load_state_dict(read_state(name.weights))
    return PretextTeacher(
        f"pretext:{name.name}",
        network,
        size=(SIZE, SIZE),
        mean=MEAN,
        std=STD,
        license="yours",
        device=device,
    )
