"""MambaVision: convolutions, then state-space mixers, then attention (2407.08083).

Names are architectures, weights are tags: `mambavision_t`, `_t2`, `_s`, `_b`, `_l`, `_l2`, `_l3`,
with `in1k`, `in21k_ft_in1k`, `in21k_ft_in1k_256`, `in21k_ft_in1k_512`.

Windows are no part of a name, for they own no parameters. One window covers the whole map of
stages 2 and 3 at the size that the weights were trained at: 14 and 7 cells at 224, 32 and 16 at
512. The tag sets the size: `mambavision_l2.in21k_ft_in1k_512` gets the windows of 512, as does
`mambavision_l2` with `img_size=512` or `window_size=(32, 16)`. Images of every other size run
too: maps are padded to whole windows and cropped again.

**The step-size bias.** Released weights were trained with a network that adds the bias of the
step size twice. Our names add it once, and whenever published weights are loaded into them that
bias is doubled: the same function, hence the released accuracy, and the corrected network to train
further. A state dict of our names thus always means the same. The published names
(`mamba_vision_T`, ..., `mamba_vision_L3_512_21k`) build the published network
(`double_dt_bias=True`) and keep its weights as they are; a state dict of ours belongs to the kind
of name that saved it.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo import axes
from zoo.build import build
from zoo.hierarchy import Hierarchy, checkpoint_filter_fn
from zoo.layers.attention import UNIT, Attention
from zoo.layers.conv import Conv2d, Stem
from zoo.layers.scan import selective_scan
from zoo.layers.short_conv import short_conv_silu
from zoo.layers.stage import ConvBlock, MixerBlock, Stage, drop_path_rates
from zoo.layers.window import (
    from_windows,
    pad_to_multiple,
    padding_bias,
    rows_and_cols,
    to_windows,
)
from zoo.weights import rename_keys

__all__ = ["MambaVision"]


def _cfg(hub: str, file: str, size: int = 224, **fields) -> dict[str, Any]:
    return {
        "hf_hub_id": f"nvidia/MambaVision-{hub}",
        "hf_hub_filename": f"{file}.pth.tar",
        "license": "cc-by-nc-sa-4.0",
        "origin_url": "https://github.com/NVlabs/MambaVision",
        "paper_ids": "arXiv:2407.08083",
        "num_classes": 1000,
        "input_size": (3, size, size),
        # timm then passes the size to the constructor, which fits the windows to it.
        "fixed_input_size": True,
        "pool_size": (math.ceil(size / 32), math.ceil(size / 32)),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        **fields,
    }


_SQUASH = dict(crop_pct=0.93, crop_mode="squash")

WEIGHTS = (  # size and tag, published name, where the weights are
    ("t.in1k", "T", _cfg("T-1K", "mambavision_tiny_1k")),
    ("t2.in1k", "T2", _cfg("T2-1K", "mambavision_tiny2_1k", crop_pct=0.98)),
    ("s.in1k", "S", _cfg("S-1K", "mambavision_small_1k", crop_pct=0.93)),
    ("b.in1k", "B", _cfg("B-1K", "mambavision_base_1k")),
    ("b.in21k_ft_in1k", "B_21k", _cfg("B-21K", "mambavision_base_21k")),
    ("l.in1k", "L", _cfg("L-1K", "mambavision_large_1k")),
    ("l.in21k_ft_in1k", "L_21k", _cfg("L-21K", "mambavision_large_21k")),
    ("l2.in1k", "L2", _cfg("L2-1K", "mambavision_large2_1k")),
    (
        "l2.in21k_ft_in1k_512",
        "L2_512_21k",
        _cfg("L2-512-21K", "mambavision_L2_21k_240m_512", 512, **_SQUASH),
    ),
    (
        "l3.in21k_ft_in1k_256",
        "L3_256_21k",
        _cfg("L3-256-21K", "mambavision_L3_21k_740m_256", 256),
    ),
    (
        "l3.in21k_ft_in1k_512",
        "L3_512_21k",
        _cfg("L3-512-21K", "mambavision_L3_21k_740m_512", 512, **_SQUASH),
    ),
)

default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for tagged, published, cfg in WEIGHTS
        for name in (
            f"mambavision_{tagged}",
            f"mamba_vision_{published}.{tagged.partition('.')[2]}",
        )
    }
)

_SMALL = dict(num_heads=(8, 16), drop_path_rate=0.2)
_BASE = dict(num_heads=(8, 16), layer_scale=1e-5, drop_path_rate=0.3)
_LARGE = dict(num_heads=(16, 32), layer_scale=1e-5, drop_path_rate=0.3)

SIZES: dict[str, dict[str, Any]] = {
    "t": dict(depths=(1, 3, 8, 4), dim=80, stem_dim=32, **_SMALL),
    "t2": dict(depths=(1, 3, 11, 4), dim=80, stem_dim=32, **_SMALL),
    "s": dict(depths=(3, 3, 7, 5), dim=96, stem_dim=64, **_SMALL),
    "b": dict(depths=(3, 3, 10, 5), dim=128, stem_dim=64, **_BASE),
    "l": dict(depths=(3, 3, 10, 5), dim=196, stem_dim=64, **_LARGE),
    "l2": dict(depths=(3, 3, 12, 5), dim=196, stem_dim=64, **_LARGE),
    "l3": dict(depths=(3, 3, 20, 10), dim=256, stem_dim=64, **(_LARGE | dict(drop_path_rate=0.5))),
}


SHAPES = """
[zoo.MambaVision] stage=stages.# C0>dim C9=num_features #stages.#.blocks>depths
norm.weight                 C9
head.fc.weight              _, C9

-- p: channels of the state-space half; z: of the other; l: rank of the step size; s: states
[zoo.MambaMixer] l=widths.0 s=widths.1 s=widths.2 C&p&z&l
in_proj.weight              p | z, C
conv_x.weight               p, 1, _
conv_z.weight               z, 1, _
x_proj.weight               l | s | s, p
dt_proj.weight              p, l
A_log                       p, s
D                           p
proj.weight                 C, p | z
"""
axes.register(SHAPES)


class MambaMixer(nn.Module):
    """Mix tokens by a state-space model in half of the channels and convolve the other half.

    MambaVision (2407.08083), the mixer: unlike Mamba's, its convolutions are not causal, and the
    second half is not a gate but is concatenated to the first.

    Args:
        double_dt_bias: The published step size: its bias is added twice and starts at 0, as the
            initialisation of all linear layers overwrites Mamba's. Otherwise it is added once and
            starts as Mamba's (2312.00752): step sizes are spread over [0.001, 0.1].
    """

    pads_rank = True
    """Pad the rank of the step size on a GPU; what looks for products by their weights does not."""

    def __init__(self, dim: int, *, state_dim: int = 8, double_dt_bias: bool = False):
        super().__init__()
        half, rank = dim // 2, math.ceil(dim / 16)
        self.widths = (rank, state_dim, state_dim)
        self.double_dt_bias = double_dt_bias
        self.in_proj = nn.Linear(dim, 2 * half, bias=False)
        self.conv_x = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.conv_z = nn.Conv1d(half, half, 3, padding=1, groups=half, bias=False)
        self.x_proj = nn.Linear(half, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        # Not `out_proj`: transformers' DETRs rename every parameter of that name when they load.
        self.proj = nn.Linear(2 * half, dim, bias=False)
        self.register_buffer("fused", None, persistent=False)

    @torch.no_grad()
    def start_steps(self) -> None:
        """Initialise the step sizes as Mamba does, unless they start as published."""
        if self.double_dt_bias:
            return
        reach = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -reach, reach)
        step = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def fuse(self) -> None:
        """Keep A instead of computing it in each forward; it is not saved."""
        self.fused = self._decay().detach()

    def _decay(self) -> Float[Tensor, "C S"]:
        if self.fused is not None:
            return self.fused
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def forward(
        self,
        x: Float[Tensor, "windows N C"],
        padding: Float[Tensor, "windows 1 1 N"] | None = None,
    ) -> Float[Tensor, "windows N C"]:
        """Mix the tokens; those where `padding` is -inf are skipped, as by attention's bias."""
        if padding is not None:
            padding = padding[:, 0, 0, :, None]
            x = x.masked_fill(padding < 0, 0)
        # Both convolutions in one pass over the channels.
        taps = torch.cat([self.conv_x.weight, self.conv_z.weight])[:, 0]
        x, z = short_conv_silu(self.in_proj(x), taps)
        plain = type(self.x_proj) is nn.Linear  # what others put in its place runs as it is
        pads = x.is_cuda and plain and self.pads_rank
        delta, B, C = self._steps(x, -self.widths[0] % UNIT if pads else 0)
        if padding is not None:
            delta = delta + padding  # a step of 0: the token leaves the state as it is
        bias = 2 * self.dt_proj.bias if self.double_dt_bias else self.dt_proj.bias
        y = selective_scan(
            x, delta, self._decay(), B, C, self.D, delta_bias=bias, delta_softplus=True
        )
        return self.proj(torch.cat([y, z], dim=-1))

    def _steps(
        self, x: Float[Tensor, "windows N C"], pad: int
    ) -> tuple[
        Float[Tensor, "windows N C"], Float[Tensor, "windows N S"], Float[Tensor, "windows N S"]
    ]:
        """Return Δ (before its bias), B and C; the rank of Δ is padded with `pad` zeros.

        A GPU's products need rows of a multiple of `UNIT`, and the large models' rank is 49.
        Padding the weights costs next to nothing; else a compiler copies all tokens to pad them.
        """
        rank, *states = self.widths
        if not pad:
            delta, B, C = self.x_proj(x).split(self.widths, dim=-1)
            return F.linear(delta, self.dt_proj.weight), B, C
        down, others = self.x_proj.weight.split((rank, sum(states)))
        weight = torch.cat([F.pad(down, (0, 0, 0, pad)), others])
        delta, B, C = F.linear(x, weight).split((rank + pad, *states), dim=-1)
        return F.linear(delta, F.pad(self.dt_proj.weight, (0, pad))), B, C


class MixerStage(Stage):
    """Mixer blocks inside the windows of a map.

    Args:
        mask_padding: Hide the zeros that pad the last windows from all tokens.
    """

    def __init__(
        self,
        blocks: list[MixerBlock],
        downsample: nn.Module,
        *,
        window: int,
        mask_padding: bool,
    ):
        super().__init__(blocks, downsample)
        self.window, self.mask_padding = window, mask_padding

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        batch, _, rows, cols = x.shape
        x = pad_to_multiple(x, self.window)
        padded = x.shape[-2:]
        padding = padding_bias(x, rows, cols, self.window) if self.mask_padding else None
        if padding is not None:
            padding = padding.repeat(batch, 1, 1, 1)
        x = to_windows(x, self.window)
        for block in self.blocks:
            x = self.run(block, x, padding)
        return from_windows(x, self.window, *padded)[:, :, :rows, :cols]


def _mixer_blocks(
    dim: int,
    num_heads: int,
    drop_paths: list[float],
    *,
    layer_scale: float | None,
    double_dt_bias: bool,
) -> list[MixerBlock]:
    """Make blocks: state-space mixers in the first half (one more if odd), then attention."""
    blocks = []
    for i, drop_path in enumerate(drop_paths):
        if i < math.ceil(len(drop_paths) / 2):
            mixer: nn.Module = MambaMixer(dim, double_dt_bias=double_dt_bias)
        else:
            mixer = Attention(dim, num_heads)
        blocks.append(MixerBlock(dim, mixer, layer_scale=layer_scale, drop_path=drop_path))
    return blocks


def _windows_for(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the windows that cover the maps of stages 2 and 3, by the image's longer side."""
    side = max(rows_and_cols(img_size))
    return math.ceil(side / 16), math.ceil(side / 32)


class MambaVision(Hierarchy):
    """MambaVision (2407.08083): two convolutional stages, two of mixers inside windows.

    Args:
        depths: Blocks of the four stages.
        dim: Width of the first stage; each stage doubles it.
        num_heads: Heads of the attention in stages 2 and 3.
        stem_dim: Width inside the stem.
        img_size: Side, or rows and columns, of the images that the windows fit: one window covers
            the map. Other sizes run too.
        window_size: Sides of the windows of stages 2 and 3, instead of those that fit `img_size`.
        layer_scale: First value of the channel scales of stages 2 and 3; `None` for none.
        double_dt_bias: Build the published network, which adds the bias of the step size twice.
            Otherwise published weights are corrected when they are loaded.
        mask_padding: Hide the zeros that pad the last windows from all tokens. Published weights
            were trained without such padding, and always run unmasked at other sizes.

    Raises:
        ValueError: widths do not split into heads, or a window has no cells.
    """

    no_decay = (".A_log", ".D")
    published = r"^(levels|patch_embed)\."

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        dim: int,
        num_heads: tuple[int, int],
        *,
        stem_dim: int = 64,
        img_size: int | tuple[int, int] = 224,
        window_size: tuple[int, int] | None = None,
        layer_scale: float | None = None,
        double_dt_bias: bool = False,
        mask_padding: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        mixing: dict[str, Any] = dict(layer_scale=layer_scale, double_dt_bias=double_dt_bias)
        stages: list[Stage] = []
        for i, drop_paths in enumerate(drop_path_rates(drop_path_rate, depths)):
            width = dim * 2**i
            downsample = nn.Identity()
            if i < 3:
                downsample = Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
            if i < 2:
                act = partial(nn.GELU, approximate="tanh")
                stages.append(Stage([ConvBlock(width, p, act=act) for p in drop_paths], downsample))
            else:
                blocks = _mixer_blocks(width, num_heads[i - 2], drop_paths, **mixing)
                stages.append(MixerStage(blocks, downsample, window=1, mask_padding=mask_padding))
        self._assemble(
            Stem(in_chans, stem_dim, dim, eps=1e-4),
            stages,
            dim,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.double_dt_bias = double_dt_bias
        for part in self.modules():
            if isinstance(part, MambaMixer):
                part.start_steps()
        self.set_input_size(img_size, window_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: tuple[int, int] | None = None,
    ) -> None:
        """Fit the windows of stages 2 and 3 to images of a size, or set them.

        Images of every size run without this too. Weights saved before still load.

        Raises:
            ValueError: a window has no cells, or neither argument was given.
        """
        if window_size is not None:
            windows = tuple(window_size)
        elif img_size is not None:
            windows = _windows_for(img_size)
        else:
            raise ValueError("Neither img_size nor window_size was given; give one of them.")
        if len(windows) != 2 or min(windows) < 1:
            raise ValueError(
                f"window_size {window_size} with img_size {img_size} makes windows of {windows} "
                "cells; two sides of at least one cell are needed, for stages 2 and 3."
            )
        # A feature extractor may have pruned stages.
        for stage, window in zip(self.stages[2:], windows, strict=False):
            assert isinstance(stage, MixerStage)
            stage.window = window
        traits = getattr(self, "_traits", {})
        if img_size is not None and "img_size" in traits:
            # timm from 1.0.31 exports a model under the size that is noted here, and no other
            self._traits = dict(traits, img_size=rows_and_cols(img_size))

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys; double a step bias that was added twice, if this model adds it once."""
        return {
            key: 2 * value if key.endswith(".dt_proj.bias") and not self.double_dt_bias else value
            for key, value in rename_keys(state, RENAMES).items()
        }


_BLOCK = r"^levels\.(\d)\.blocks\.(\d+)\."

RENAMES = (
    (r"^patch_embed\.conv_down\.0\.", r"stem.0.conv."),
    (r"^patch_embed\.conv_down\.1\.", r"stem.0.norm."),
    (r"^patch_embed\.conv_down\.3\.", r"stem.1.conv."),
    (r"^patch_embed\.conv_down\.4\.", r"stem.1.norm."),
    (r"^levels\.(\d)\.downsample\.reduction\.0\.", r"stages.\1.downsample."),
    (_BLOCK + r"conv([12])\.", r"stages.\1.blocks.\2.conv\3.conv."),
    (r"^levels\.([01])\.blocks\.(\d+)\.norm([12])\.", r"stages.\1.blocks.\2.conv\3.norm."),
    (_BLOCK + r"mixer\.conv1d_([xz])\.", r"stages.\1.blocks.\2.mixer.conv_\3."),
    (_BLOCK + r"mixer\.out_proj\.", r"stages.\1.blocks.\2.mixer.proj."),
    (_BLOCK + r"gamma_([12])$", r"stages.\1.blocks.\2.scale\3.gamma"),
    (r"^levels\.", r"stages."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""Theirs -> ours, first match wins."""


def _mambavision(name: str, size: str, pretrained: bool, **kwargs) -> nn.Module:
    sizes = SIZES[size] | kwargs
    return build(MambaVision, name, pretrained, filter_fn=checkpoint_filter_fn, **sizes)


@register_model
def mambavision_t(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-T: 31.8 M parameters, 4.6 GMACs at 224."""
    return _mambavision("mambavision_t", "t", pretrained, **kwargs)


@register_model
def mambavision_t2(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-T2: 35.1 M parameters, 5.2 GMACs at 224."""
    return _mambavision("mambavision_t2", "t2", pretrained, **kwargs)


@register_model
def mambavision_s(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-S: 50.1 M parameters, 7.6 GMACs at 224."""
    return _mambavision("mambavision_s", "s", pretrained, **kwargs)


@register_model
def mambavision_b(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-B: 97.7 M parameters, 15.2 GMACs at 224."""
    return _mambavision("mambavision_b", "b", pretrained, **kwargs)


@register_model
def mambavision_l(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-L: 228.0 M parameters, 35.2 GMACs at 224."""
    return _mambavision("mambavision_l", "l", pretrained, **kwargs)


@register_model
def mambavision_l2(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-L2: 241.6 M parameters, 37.9 GMACs at 224 and 206.2 at 512."""
    return _mambavision("mambavision_l2", "l2", pretrained, **kwargs)


@register_model
def mambavision_l3(pretrained: bool = False, **kwargs) -> nn.Module:
    """MambaVision-L3: 739.6 M parameters, 123.6 GMACs at 256 and 511.3 at 512."""
    return _mambavision("mambavision_l3", "l3", pretrained, **kwargs)


def _publish(name: str, size: str) -> None:
    """Register a published name, which builds the published network."""

    def entry(pretrained: bool = False, **kwargs) -> nn.Module:
        return _mambavision(name, size, pretrained, **(dict(double_dt_bias=True) | kwargs))

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"The published {name}: `mambavision_{size}` with its step bias added twice."
    globals()[name] = register_model(entry)


for _tagged, _name, _ in WEIGHTS:
    _publish(f"mamba_vision_{_name}", _tagged.partition(".")[0])
