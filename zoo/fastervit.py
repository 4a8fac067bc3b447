"""FasterViT: convolutions, then windows that exchange carrier tokens (2306.06189).

Names are architectures, weights are tags:

* `fastervit_0` ... `fastervit_6`, tag `in1k`: windows of 7 and carriers in stage 2.
* `fastervit_4_w14`, `_w24`, `_w32`, `_w48`, tags `in21k_ft_in1k_224` ... `_768`: the networks of
  the 21k weights. No carriers; stage 2 has windows of the named side and stage 3 of half of it, so
  that one window covers the stage at the tag's size. All four have the same parameters.

All of these take any size at run time: maps are padded to whole windows and cropped again, and
carriers and position tables follow the grid of windows. At a square size this is
the network that the published any-resolution code builds for it, with one difference: a map of a
single window keeps its carriers, so that every parameter is used at every size.

The published names (`faster_vit_0_224`, `faster_vit_4_21k_384`, `faster_vit_0_any_res`, ...) build
the published networks for one `resolution`, the flaws of their carriers included: see
`published_carriers` of `FasterViT`.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo import axes
from zoo.build import build
from zoo.hierarchy import Hierarchy, checkpoint_filter_fn
from zoo.layers.attention import Attention
from zoo.layers.conv import Conv2d, Stem
from zoo.layers.gelu import GELU
from zoo.layers.position import (
    CarrierBias,
    GridEmbedding,
    WindowPositionBias,
    compute_together,
)
from zoo.layers.stage import ConvBlock, MixerBlock, Stage, drop_path_rates
from zoo.layers.window import (
    from_windows,
    pad_to_multiple,
    padding_bias,
    rows_and_cols,
    to_windows,
)
from zoo.weights import rename_keys

__all__ = ["FasterViT"]

_logger = logging.getLogger(__name__)


def _cfg(file: str, resolution: int | tuple[int, int] = 224, **fields) -> dict:
    rows, cols = rows_and_cols(resolution)
    return dict(
        hf_hub_id="ahatamiz/FasterViT",
        hf_hub_filename=f"{file}.pth.tar",
        # No licence is stated beside the files; that of their code allows research only.
        license="nvidia-source-code-nc",
        num_classes=1000,
        input_size=(3, rows, cols),
        pool_size=(math.ceil(rows / 32), math.ceil(cols / 32)),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="stem.0.conv",
        classifier="head.fc",
        **(dict(crop_pct=1.0, crop_mode="center") | fields),
    )


_CROPS = {  # of the weights that are not tested on the whole image, centred
    "0": dict(crop_pct=0.875),
    "4_w14": dict(crop_pct=0.95, crop_mode="squash"),
    "4_w24": dict(crop_mode="squash"),
    "4_w32": dict(crop_mode="squash"),
    "4_w48": dict(crop_pct=0.93, crop_mode="squash"),
}

_TRAINED_AT = {str(i): 224 for i in range(7)} | {f"4_w{r // 16}": r for r in (224, 384, 512, 768)}

_ANY_RES = {"2": (541, 960)}  # what the published code builds by default
_ANY_RES_DEFAULT = (576, 960)


def _published_names(size: str) -> tuple[str, str]:
    """The two published names of a size: fixed resolution and any resolution."""
    if "_w" in size:
        plain = f"faster_vit_4_21k_{_TRAINED_AT[size]}"
        return plain, f"{plain}_any_res"
    return f"faster_vit_{size}_224", f"faster_vit_{size}_any_res"


def _cfgs_of(size: str) -> dict[str, dict]:
    resolution, crop = _TRAINED_AT[size], _CROPS.get(size, {})
    if "_w" in size:
        tag, file = f"in21k_ft_in1k_{resolution}", f"fastervit_4_21k_{resolution}_{size[2:]}"
    else:
        tag, file = "in1k", f"fastervit_{size}_224_1k"
    plain, any_res = _published_names(size)
    built_for = _ANY_RES.get(size, _ANY_RES_DEFAULT)
    return {
        f"fastervit_{size}.{tag}": _cfg(file, resolution, **crop),
        f"{plain}.{tag}": _cfg(file, resolution, **crop),
        f"{any_res}.{tag}": _cfg(file, built_for, **crop),
    }


default_cfgs = generate_default_cfgs(
    {name: cfg for size in _TRAINED_AT for name, cfg in _cfgs_of(size).items()}
)

_SMALL = dict(num_heads=(8, 16), drop_path_rate=0.2)
_LARGE = dict(num_heads=(16, 32), layer_scale=1e-5, propagate=True, drop_path_rate=0.3)
_FLAT = _LARGE | dict(
    depths=(3, 3, 12, 5), dim=196, stem_dim=64, carriers=False, propagate=False, drop_path_rate=0.42
)

SIZES = {
    "0": _SMALL | dict(depths=(2, 3, 6, 5), dim=64, stem_dim=64),
    "1": _SMALL | dict(depths=(1, 3, 8, 5), dim=80, stem_dim=32),
    "2": _SMALL | dict(depths=(3, 3, 8, 5), dim=96, stem_dim=64),
    "3": _LARGE | dict(depths=(3, 3, 12, 5), dim=128, stem_dim=64, num_heads=(8, 16)),
    "4": _LARGE | dict(depths=(3, 3, 12, 5), dim=196, stem_dim=64),
    "5": _LARGE | dict(depths=(3, 3, 12, 5), dim=320, stem_dim=64),
    "6": _LARGE | dict(depths=(3, 3, 16, 8), dim=320, stem_dim=64, drop_path_rate=0.5),
    "4_w14": _FLAT | dict(window_size=(14, 7)),
    "4_w24": _FLAT | dict(window_size=(24, 12)),
    "4_w32": _FLAT | dict(window_size=(32, 16)),
    "4_w48": _FLAT | dict(window_size=(48, 24)),
}

SHAPES = """
[zoo.FasterViT] stage=stages.# C0>dim C9=num_features #stages.#.blocks>depths
norm.weight                 C9
head.fc.weight              _, C9

[zoo.HatStage]
tokenizer.conv.weight       C, 1, _, _

-- The heads of a block's attention are those of its position bias.
[zoo.HatBlock zoo.Carriers] h=layer.mixer.num_heads d=layer.mixer.head_dim h>num_heads !d:scale C&h
pos_bias.mlp.0.weight       b, _
pos_bias.mlp.2.weight       h, b
layer.mixer.qkv.weight      3 h d, C
layer.mixer.proj.weight     C, h d
"""
axes.register(SHAPES)

SIDE = 2
"""Carriers along one side of a window; a window has `SIDE`² of them."""


class CarrierStart(nn.Module):
    """The first carriers of a stage: its map, blurred and pooled to `SIDE`² cells a window."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(
        self, x: Float[Tensor, "B C H W"], rows: int, cols: int
    ) -> Float[Tensor, "windows n C"]:
        x = self.conv(x).permute(0, 2, 3, 1)
        batch, height, width, chs = x.shape
        x = _mean_of_spans(x.reshape(batch, height, width * chs), SIDE * rows)
        x = _mean_of_spans(x.view(-1, width, chs), SIDE * cols)
        x = x.view(batch, SIDE * rows, SIDE * cols, chs).permute(0, 3, 1, 2)
        return to_windows(x, SIDE)


def _mean_of_spans(x: Float[Tensor, "n side C"], out: int) -> Float[Tensor, "n out C"]:
    """Average over `out` spans of equal length at equal steps, which may overlap.

    By a matrix product: a compiler takes 9 s for one kernel, that of the backward pass of torch's
    pooling together with the cutting into windows.
    """
    side = x.shape[1]
    step = side // out
    length = side - (out - 1) * step
    first = step * torch.arange(out, device=x.device)[:, None]
    cell = torch.arange(side, device=x.device)
    spans = ((first <= cell) & (cell < first + length)).to(x.dtype)
    return torch.bmm(spans.expand(x.shape[0], -1, -1), x) / length


class Carriers(nn.Module):
    """Attention among all carriers of a map, which are in window order before and after.

    `swapped` keeps a flaw of the published code: on the way back to window order it swaps rows and
    columns of windows, so that carriers of a map that is not square end in other windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        embed: bool,
        published: bool,
        **layer,
    ):
        super().__init__()
        self.swapped = published
        self.pos_embed = GridEmbedding(dim, *grid) if embed else None
        self.pos_bias = CarrierBias(num_heads, *grid, square=published)
        self.layer = MixerBlock(dim, Attention(dim, num_heads), **layer)

    def set_grid(self, rows: int, cols: int) -> None:
        """Make the tables for a grid of carriers."""
        for part in (self.pos_embed, self.pos_bias):
            if part is not None:
                part.set_grid(rows, cols)

    def forward(
        self,
        x: Float[Tensor, "windows n C"],
        rows: int,
        cols: int,
        embed: Float[Tensor, "N C"] | None,
        bias: Float[Tensor, "heads N N"],
    ) -> Float[Tensor, "windows n C"]:
        """Mix the carriers of `rows` x `cols` windows, with their position embedding and bias."""
        x = x.view(-1, rows, cols, SIDE, SIDE, x.shape[-1]).transpose(2, 3)
        x = x.reshape(-1, rows * cols * SIDE * SIDE, x.shape[-1])
        x = self.layer(x if embed is None else x + embed, bias)
        if self.swapped:
            rows, cols = cols, rows
        x = x.view(-1, rows, SIDE, cols, SIDE, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, SIDE * SIDE, x.shape[-1])


class Positions(NamedTuple):
    """Position embeddings and biases: of the tokens in a window, of the carriers in the map."""

    embed: Float[Tensor, "N C"]
    bias: Float[Tensor, "heads prefix+N prefix+N"]
    carrier_embed: Float[Tensor, "n C"] | None
    carrier_bias: Float[Tensor, "heads n n"] | None


class HatBlock(nn.Module):
    """Hierarchical attention: among the carriers, then in windows with their carriers.

    Args:
        carriers: Attention among the carriers; `None` for plain windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        carriers: Carriers | None,
        **layer,
    ):
        super().__init__()
        self.carriers = carriers
        self.prefix = 0 if carriers is None else SIDE * SIDE
        self.pos_embed = GridEmbedding(dim, window, window)
        self.pos_bias = WindowPositionBias(num_heads, window, prefix=self.prefix)
        self.layer = MixerBlock(dim, Attention(dim, num_heads), **layer)

    def set_window(self, window: int) -> None:
        """Set the window's side, which is the unit of its offsets too."""
        self.pos_bias.trained = window
        self.pos_bias.set_window(window)
        self.pos_embed.set_grid(window, window)

    def forward(
        self,
        x: Float[Tensor, "windows prefix+N C"],
        grid: tuple[int, int],
        padding: Float[Tensor, "grid 1 1 N"] | None,
        positions: Positions,
    ) -> Float[Tensor, "windows prefix+N C"]:
        """Mix the tokens of all windows of a batch; each window's carriers come first.

        Args:
            grid: Rows and columns of windows.
            padding: For one image: -inf for the cells that are padding, else 0.
            positions: This block's item of `HatStage.positions`.
        """
        embed, bias, *of_carriers = positions
        carriers, x = x[:, : self.prefix], x[:, self.prefix :] + embed
        if self.carriers is not None:
            x = torch.cat([self.carriers(carriers, *grid, *of_carriers), x], dim=1)
        return self.layer(x, self._bias(x, padding, bias))

    def _bias(self, x: Tensor, padding: Tensor | None, bias: Tensor) -> Tensor:
        if padding is None:
            return bias
        bias = bias + F.pad(padding, (bias.shape[-1] - padding.shape[-1], 0))
        return bias.repeat(x.shape[0] // padding.shape[0], 1, 1, 1)


def _spread(x: Float[Tensor, "windows n C"], window: int) -> Float[Tensor, "windows N C"]:
    """Copy to each cell of a window its nearest carrier."""
    x = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return F.interpolate(x, size=(window, window)).flatten(2).transpose(1, 2)


class HatStage(Stage):
    """Window attention at one resolution, with or without carriers.

    Args:
        propagate: Add each window's carriers to its cells at the end.
        mask_padding: Hide the cells that pad the last windows from attention.
    """

    def __init__(
        self,
        blocks: list[HatBlock],
        tokenizer: CarrierStart | None,
        downsample: nn.Module,
        *,
        window: int,
        propagate: bool,
        mask_padding: bool,
    ):
        super().__init__(blocks, downsample)
        self.window, self.propagate, self.mask_padding = window, propagate, mask_padding
        self.tokenizer = tokenizer

    def set_window(self, window: int) -> None:
        """Change the side of the windows."""
        self.window = window
        for block in self.blocks:
            assert isinstance(block, HatBlock)
            block.set_window(window)

    def set_map(self, rows: int, cols: int) -> None:
        """Make the tables of the carriers for maps of one size."""
        rows, cols = -(-rows // self.window), -(-cols // self.window)
        for block in self.blocks:
            assert isinstance(block, HatBlock)
            if block.carriers is not None:
                block.carriers.set_grid(SIDE * rows, SIDE * cols)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        rows, cols = x.shape[-2:]
        x = pad_to_multiple(x, self.window)
        padded = x.shape[-2:]
        grid = (padded[0] // self.window, padded[1] // self.window)
        padding = padding_bias(x, rows, cols, self.window) if self.mask_padding else None
        tokens = to_windows(x, self.window)
        if self.tokenizer is not None:
            tokens = torch.cat([self.tokenizer(x, *grid), tokens], dim=1)
        for block, positions in zip(self.blocks, self.positions(*grid), strict=True):
            tokens = self.run(block, tokens, grid, padding, positions)
        cells = self.window**2
        carriers, x = tokens[:, :-cells], tokens[:, -cells:]
        last = cast(HatBlock, self.blocks[-1]).carriers
        if self.propagate and last is not None:
            # Through the scale of the carriers' attention, as the weights were trained.
            x = x + _spread(last.layer.scale1(carriers), self.window)
        return from_windows(x, self.window, *padded)[:, :, :rows, :cols]

    def positions(self, rows: int, cols: int) -> Iterator[Positions]:
        """Compute the positions of each block for `rows` x `cols` windows, all blocks at once."""
        blocks = list(cast(Iterable[HatBlock], self.blocks))
        carriers = [block.carriers for block in blocks if block.carriers is not None]
        embeds = compute_together([block.pos_embed for block in blocks])
        biases = compute_together([block.pos_bias for block in blocks])
        embeds_of_carriers = biases_of_carriers = [None] * len(blocks)
        grid = (SIDE * rows, SIDE * cols)
        if own := [part.pos_embed for part in carriers if part.pos_embed is not None]:
            embeds_of_carriers = compute_together(own, grid)
        if carriers:
            biases_of_carriers = compute_together([part.pos_bias for part in carriers], grid)
        return map(Positions, embeds, biases, embeds_of_carriers, biases_of_carriers)


def _downsample(dim: int) -> nn.Sequential:
    conv = Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(OrderedDict(norm=LayerNorm2d(dim), conv=conv))


def _map_size(img_size: int | tuple[int, int], stage: int, floor: bool = False) -> tuple[int, int]:
    """Return rows and columns of a stage's map, rounded up; the published code rounds down."""
    reduction = 4 * 2**stage
    rows, cols = rows_and_cols(img_size)
    if floor:
        return rows // reduction, cols // reduction
    return -(-rows // reduction), -(-cols // reduction)


def _hat_stage(
    dim: int,
    num_heads: int,
    window: int,
    drop_paths: list[float],
    downsample: nn.Module,
    *,
    carriers: bool,
    layer_scale: float | None,
    propagate: bool,
    map_size: tuple[int, int],
    mask_padding: bool,
    published: bool,
) -> HatStage:
    """Make stage 2 or 3; the arguments are those of `FasterViT`."""
    rows, cols = (-(-side // window) for side in map_size)
    carriers = carriers and not (published and rows * cols == 1)
    embed = rows == cols or not published
    blocks = []
    for drop_path in drop_paths:
        layer = dict(layer_scale=layer_scale, drop_path=drop_path)
        mixer = None
        if carriers:
            grid = (SIDE * rows, SIDE * cols)
            mixer = Carriers(dim, num_heads, grid, embed=embed, published=published, **layer)
        blocks.append(HatBlock(dim, num_heads, window, carriers=mixer, **layer))
    tokenizer = CarrierStart(dim) if carriers else None
    return HatStage(
        blocks,
        tokenizer,
        downsample,
        window=window,
        propagate=propagate,
        mask_padding=mask_padding,
    )


class FasterViT(Hierarchy):
    """FasterViT (2306.06189): two convolutional stages, two of hierarchical attention.

    Args:
        depths: Blocks of the four stages.
        dim: Width of the first stage; each stage doubles it.
        stem_dim: Width inside the stem.
        num_heads: Heads of stages 2 and 3.
        window_size: Side of the windows of stages 2 and 3.
        carriers: Stage 2 has carrier tokens.
        layer_scale: First value of the channel scales of the attention stages; `None` for none.
        propagate: Stage 2 ends by adding each window's carriers to its cells.
        img_size: Side, or rows and columns, of the images that the tables are made for (and kept
            for in the deploy form). Other sizes run too.
        mask_padding: Hide the cells that pad the last windows from window attention.
        published_carriers: Build what the published any-resolution code builds for `img_size`. No
            carriers if stage 2 has one window; no position embedding of the carriers unless its
            grid of windows is square; the bias of `CarrierBias(square=True)`; and swapped carriers
            (`Carriers.swapped`). On square grids only the first differs from the corrected form.
    """

    no_decay = ("pos_embed.", "pos_bias.")
    published = r"^(levels|patch_embed)\."

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        dim: int,
        num_heads: tuple[int, int],
        *,
        stem_dim: int = 64,
        window_size: tuple[int, int] = (7, 7),
        carriers: bool = True,
        layer_scale: float | None = None,
        propagate: bool = False,
        img_size: int | tuple[int, int] = 224,
        mask_padding: bool = False,
        published_carriers: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        stages: list[Stage] = []
        for i, drop_paths in enumerate(drop_path_rates(drop_path_rate, depths)):
            width = dim * 2**i
            downsample = _downsample(width) if i < 3 else nn.Identity()
            if i < 2:
                blocks = [ConvBlock(width, p, act=GELU) for p in drop_paths]
                stages.append(Stage(blocks, downsample))
                continue
            stages.append(
                _hat_stage(
                    width,
                    num_heads[i - 2],
                    window_size[i - 2],
                    drop_paths,
                    downsample,
                    carriers=carriers and i == 2,
                    layer_scale=layer_scale,
                    propagate=propagate,
                    map_size=_map_size(img_size, i, published_carriers),
                    mask_padding=mask_padding,
                    published=published_carriers,
                )
            )
        self._assemble(
            Stem(in_chans, stem_dim, dim, eps=1e-4),
            stages,
            dim,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.img_size = rows_and_cols(img_size)
        self.published_carriers = published_carriers

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Set the size of the images, of the windows of stages 2 and 3, or both.

        Images of every size run without this too. It makes the tables, and what the deploy form
        keeps, for the new size. Parameters stay, and so do the windows without `window_size`.
        """
        if window_size is not None:
            for stage, window in zip(self.stages[2:], rows_and_cols(window_size), strict=False):
                assert isinstance(stage, HatStage)
                stage.set_window(window)
        if img_size is not None:
            self.img_size = rows_and_cols(img_size)
        for i, stage in enumerate(self.stages[2:], start=2):
            assert isinstance(stage, HatStage)
            stage.set_map(*_map_size(self.img_size, i))

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys; drop the carrier weights that a published network has no place for.

        The published any-resolution networks load the files of the square ones, which hold more
        about carriers than a network for another size has.
        """
        state = rename_keys(state, RENAMES, drop=COMPUTED)
        if not self.published_carriers:
            return state
        own = self.state_dict()
        extra = [k for k in state if (".carriers." in k or ".tokenizer." in k) and k not in own]
        if extra:
            _logger.warning(
                f"{len(extra)} weights of carriers are left out: the network for "
                f"{self.img_size} has no place for them."
            )
        return {key: value for key, value in state.items() if key not in extra}


COMPUTED = r"\.relative_(bias|coords_table|position_index)$|\.global_tokenizer\.pos_embed\."
"""Published keys of tables, and of a convolution that is listed twice."""

_BLOCK = r"^levels\.([23])\.blocks\.(\d+)\."

RENAMES = (  # theirs -> ours, first match wins
    (r"^patch_embed\.conv_down\.0\.", r"stem.0.conv."),
    (r"^patch_embed\.conv_down\.1\.", r"stem.0.norm."),
    (r"^patch_embed\.conv_down\.3\.", r"stem.1.conv."),
    (r"^patch_embed\.conv_down\.4\.", r"stem.1.norm."),
    (r"^levels\.([01])\.blocks\.(\d+)\.(conv|norm)([12])\.", r"stages.\1.blocks.\2.conv\4.\3."),
    (r"^levels\.(\d)\.downsample\.reduction\.0\.", r"stages.\1.downsample.conv."),
    (r"^levels\.(\d)\.global_tokenizer\.to_global_feature\.pos\.", r"stages.\1.tokenizer.conv."),
    (_BLOCK + r"hat_attn\.pos_emb_funct\.cpb_mlp\.", r"stages.\1.blocks.\2.carriers.pos_bias.mlp."),
    (_BLOCK + r"hat_pos_embed\.cpb_mlp\.", r"stages.\1.blocks.\2.carriers.pos_embed.mlp."),
    (_BLOCK + r"hat_attn\.", r"stages.\1.blocks.\2.carriers.layer.mixer."),
    (_BLOCK + r"hat_(norm1|norm2|mlp)\.", r"stages.\1.blocks.\2.carriers.layer.\3."),
    (_BLOCK + r"gamma([12])$", r"stages.\1.blocks.\2.carriers.layer.scale\3.gamma"),
    (_BLOCK + r"attn\.pos_emb_funct\.cpb_mlp\.", r"stages.\1.blocks.\2.pos_bias.mlp."),
    (_BLOCK + r"pos_embed\.cpb_mlp\.", r"stages.\1.blocks.\2.pos_embed.mlp."),
    (_BLOCK + r"attn\.", r"stages.\1.blocks.\2.layer.mixer."),
    (_BLOCK + r"(norm1|norm2|mlp)\.", r"stages.\1.blocks.\2.layer.\3."),
    (_BLOCK + r"gamma3$", r"stages.\1.blocks.\2.layer.scale1.gamma"),
    (_BLOCK + r"gamma4$", r"stages.\1.blocks.\2.layer.scale2.gamma"),
    (r"^levels\.", r"stages."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _fastervit(name: str, size: str, pretrained: bool, **kwargs) -> nn.Module:
    sizes = SIZES[size] | kwargs
    return build(FasterViT, name, pretrained, filter_fn=checkpoint_filter_fn, **sizes)


@register_model
def fastervit_0(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-0: 31.4 M parameters, 3.5 GMACs at 224."""
    return _fastervit("fastervit_0", "0", pretrained, **kwargs)


@register_model
def fastervit_1(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-1: 53.4 M parameters, 5.5 GMACs at 224."""
    return _fastervit("fastervit_1", "1", pretrained, **kwargs)


@register_model
def fastervit_2(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-2: 75.9 M parameters, 9.0 GMACs at 224."""
    return _fastervit("fastervit_2", "2", pretrained, **kwargs)


@register_model
def fastervit_3(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-3: 159.5 M parameters, 18.7 GMACs at 224."""
    return _fastervit("fastervit_3", "3", pretrained, **kwargs)


@register_model
def fastervit_4(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-4: 365.6 M parameters, 43.2 GMACs at 224."""
    return _fastervit("fastervit_4", "4", pretrained, **kwargs)


@register_model
def fastervit_5(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-5: 957.5 M parameters, 114 GMACs at 224."""
    return _fastervit("fastervit_5", "5", pretrained, **kwargs)


@register_model
def fastervit_6(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-6: 1360.3 M parameters, 144 GMACs at 224."""
    return _fastervit("fastervit_6", "6", pretrained, **kwargs)


@register_model
def fastervit_4_w14(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-4 without carriers, windows for 224: 271.9 M parameters, 41.6 GMACs."""
    return _fastervit("fastervit_4_w14", "4_w14", pretrained, **kwargs)


@register_model
def fastervit_4_w24(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-4 without carriers, windows for 384: 271.9 M parameters, 126.6 GMACs."""
    return _fastervit("fastervit_4_w24", "4_w24", pretrained, **kwargs)


@register_model
def fastervit_4_w32(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-4 without carriers, windows for 512: 271.9 M parameters, 234.1 GMACs."""
    return _fastervit("fastervit_4_w32", "4_w32", pretrained, **kwargs)


@register_model
def fastervit_4_w48(pretrained: bool = False, **kwargs) -> nn.Module:
    """FasterViT-4 without carriers, windows for 768: 271.9 M parameters, 585.1 GMACs."""
    return _fastervit("fastervit_4_w48", "4_w48", pretrained, **kwargs)


def _publish(name: str, size: str, built_for: int | tuple[int, int], **defaults) -> None:
    """Register a published name: the published network for its `resolution`."""

    def entry(pretrained: bool = False, resolution=built_for, **kwargs) -> nn.Module:
        published = dict(img_size=rows_and_cols(resolution), published_carriers=True)
        return _fastervit(name, size, pretrained, **(published | defaults | kwargs))

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"The published {name}: FasterViT {size} as its code builds it."
    globals()[name] = register_model(entry)


for _size in SIZES:
    _plain, _any_res = _published_names(_size)
    _publish(_plain, _size, _TRAINED_AT[_size])
    _any_res_only = dict(drop_path_rate=0.3) if "_w" in _size else {}
    _publish(_any_res, _size, _ANY_RES.get(_size, _ANY_RES_DEFAULT), **_any_res_only)
