"""E-RADIO: the efficient student of AM-RADIO (2312.06709), convolutions first, then windows.

Four stages at strides 4 to 32. The first two are convolutional; in the other two, blocks attend
inside windows, first on a map of half the side and then on the full one. A neck sums the last
stages into one dense map, through which E-RADIO is distilled.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import DropPath, Mlp
from timm.models import FeatureInfo, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo import axes
from zoo.build import build
from zoo.hierarchy import Hierarchy, checkpoint_filter_fn
from zoo.layers import conv
from zoo.layers.attention import Attention
from zoo.layers.conv import ConvNorm
from zoo.layers.gelu import GELU
from zoo.layers.nearest import resize_nearest
from zoo.layers.position import WindowPositionBias, compute_together
from zoo.layers.stage import Stage, drop_path_rates
from zoo.layers.window import from_windows, pad_to_multiple, rows_and_cols, to_windows
from zoo.weights import read_state, rename_keys

__all__ = ["ERadio"]

STRIDE = 32
"""Stride of the last stage; image sides are multiples of it."""

MAX_WINDOW = 16
"""Largest window that `img_size` chooses; `window_size` may be larger."""


def _cfg(size: int, **kwargs) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // STRIDE, size // STRIDE),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": OPENAI_CLIP_MEAN,
        "std": OPENAI_CLIP_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2312.06709",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        # The file carries RADIO's own wrapping, so `ERadio.load_pretrained` reads it.
        "eradio_l.radio_v2": _cfg(
            512,
            hf_hub_id="nvidia/RADIO",
            hf_hub_filename="eradio_v2.pth.tar",
            custom_load="hf",
            license="nscl-nc",
            origin_url="https://github.com/NVlabs/RADIO",
        ),
        "eradio_xxxtiny.untrained": _cfg(256),
        "eradio_xxxtiny_8x_ws12.untrained": _cfg(384),
        "eradio_xxxtiny_8x_ws16.untrained": _cfg(512),
        "eradio_nano.untrained": _cfg(128, num_classes=0),
    }
)

_XXXTINY = dict(depths=(1, 3, 4, 5), dim=32, num_heads=(8, 16), in_dim=32, neck_dim=256)

SIZES: dict[str, dict[str, Any]] = {
    "l": dict(depths=(3, 3, 5, 5), dim=192, num_heads=(8, 16), in_dim=64, neck_dim=1536),
    "xxxtiny": _XXXTINY,
    "xxxtiny_8x_ws12": dict(_XXXTINY, light=True, bias_hidden=64, trained_window=12),
    "xxxtiny_8x_ws16": dict(_XXXTINY, light=True, bias_hidden=64, neck_start=1),
    # Ours, published by nobody: small enough to train on a laptop at 128 pixels.
    "nano": dict(
        depths=(1, 1, 2, 2),
        dim=16,
        num_heads=(2, 4),
        in_dim=16,
        neck_dim=128,
        light=True,
        bias_hidden=64,
        trained_window=4,
    ),
}


SHAPES = """
[zoo.ERadio] stage=stages.# C0>dim C9=num_features #stages.#.blocks>depths
norm.weight                 C9
head.fc.weight              _, C9

[zoo.FittedStage]
downsample.conv.weight      C+, C, _, _
downsample.norm.weight      C+

-- a: the half that goes straight to the end; b: the half that the bottlenecks add to, x times
[zoo.SplitConv] C&a&b !!x:depth
enter.conv.weight           a | b, C, _, _
enter.norm.weight           a | b
bottlenecks.#.0.conv.weight m#, b, _, _
bottlenecks.#.0.norm.weight m#
bottlenecks.#.1.conv.weight b, m#, _, _
bottlenecks.#.1.norm.weight b
leave.conv.weight           C, a | x b, _, _
leave.norm.weight           C

-- u: the stream at the unit's own resolution
[zoo.WindowUnit] h=attn.num_heads d=attn.head_dim h>num_heads !d:scale C&u&f&h u~C?ratio=1
enter.weight                u, C, _, _
leave.weight                @u, C, _, _
leave.bias                  C
enter.conv.weight           C, 1, _, _
enter.conv.weight           C, C, _, _
enter.norm.weight           C
enter.1.conv.weight         u, C, _, _
enter.1.norm.weight         u
leave.1.conv.weight         C, u, _, _
leave.1.norm.weight         C
position.mlp.0.weight       b, _
position.mlp.2.weight       h, b
norm1.weight                u
attn.qkv.weight             3 h d, u
attn.proj.weight            u, h d
norm2.weight                u
mlp.fc1.weight              f, u
mlp.fc2.weight              u, f

-- w0, w1, ...: the streams of the stages from the neck's first on
[zoo.Neck] o>neck_dim w0~C1?start=1 w1~C2?start=1 w2~C3?start=1 w0~C2?start=2 w1~C3?start=2
projections.#.0.conv.weight w#, 1, _, _
projections.#.0.norm.weight w#
projections.#.1.weight      o, w#, _, _
"""
axes.register(SHAPES)


class Stem(conv.Stem):
    """The common stem; sides that are no multiples of 32 are refused, or padded (`pad_input`)."""

    def __init__(self, in_chans: int, hidden: int, dim: int, *, pad_input: bool):
        super().__init__(in_chans, hidden, dim, eps=1e-5)
        self.pad_input = pad_input

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = pad_to_multiple(input, STRIDE) if self.pad_input else input
        _check_sides(*x.shape[-2:])
        return super().forward(x)


def _check_sides(rows: int, cols: int) -> None:
    if rows % STRIDE or cols % STRIDE:
        up = [math.ceil(side / STRIDE) * STRIDE for side in (rows, cols)]
        raise ValueError(
            f"An image is {rows}x{cols}; both sides must be multiples of {STRIDE}. "
            f"Resize it to {up[0]}x{up[1]}, or build the model with pad_input=True."
        )


class SplitConv(nn.Module):
    """A chain of residual bottlenecks on half the channels; the outputs of all are mixed."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        half = dim // 2
        self.enter = ConvNorm(dim, dim, 1, act=nn.SiLU)
        self.bottlenecks = nn.ModuleList(
            nn.Sequential(ConvNorm(half, half, act=nn.SiLU), ConvNorm(half, half, act=nn.SiLU))
            for _ in range(depth)
        )
        self.leave = ConvNorm((2 + depth) * half, dim, 1, act=nn.SiLU)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        first, second = self.enter(x).chunk(2, dim=1)
        steps = [first, second.clone()]  # else a convolution copies half a map, forward and back
        for enter, leave in cast(Iterable[nn.Sequential], self.bottlenecks):
            steps.append(leave(enter(steps[-1]), plus=steps[-1]))
        return self.leave(torch.cat(steps, dim=1))


class ResidualConv(ConvNorm):
    """A 3x3 convolution of a map, added to the map."""

    def forward(self, x: Float[Tensor, "B C H W"], **options: Any) -> Float[Tensor, "B C H W"]:
        return super().forward(x, plus=x, **options)


class Repeat(nn.Module):
    """Repeat each cell of a map to `ratio` x `ratio` cells."""

    def __init__(self, ratio: int):
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        return resize_nearest(x, *(side * self.ratio for side in x.shape[-2:]))


def _resampling(dim: int, ratio: int, *, light: bool) -> tuple[nn.Module, nn.Module]:
    """Make the layers that shrink a map by `ratio` and enlarge it again."""
    if light:
        down = nn.Sequential(nn.AvgPool2d(ratio), ConvNorm(dim, dim, 1))
        up = nn.Sequential(Repeat(ratio), ConvNorm(dim, dim, 1))
        return down, up
    return nn.Conv2d(dim, dim, ratio, ratio), nn.ConvTranspose2d(dim, dim, ratio, ratio)


class WindowUnit(nn.Module):
    """Attention and MLP inside windows of a map that is `ratio` times smaller, or of the map.

    `window * ratio` divides the map's sides: `FittedStage` sees to it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ratio: int,
        window: int,
        bias_hidden: int,
        light: bool,
        drop_path: float,
    ):
        super().__init__()
        self.ratio = ratio
        self.enter: nn.Module
        self.leave: nn.Module
        if ratio > 1:
            self.enter, self.leave = _resampling(dim, ratio, light=light)
        else:
            self.enter = ResidualConv(dim, dim, groups=dim if light else 1)
            self.leave = nn.Identity()
        self.position = WindowPositionBias(num_heads, window, hidden=bias_hidden)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=False, proj_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=GELU, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "B C H W"], bias: Float[Tensor, "heads N N"]
    ) -> Float[Tensor, "B C H W"]:
        """Attend inside windows; `bias` is the output of `position`."""
        entered = self.enter(x)
        rows, cols = entered.shape[-2:]
        tokens = to_windows(entered, self.position.window)
        # The batch consists of windows here, so drop path skips windows and not images.
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), bias))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        left = self.leave(from_windows(tokens, self.position.window, rows, cols))
        return 0.5 * left + 0.5 * x


class WindowBlock(nn.Sequential):
    """A chain of units, one for each of the `ratios` at which to attend."""

    def __init__(self, dim: int, num_heads: int, ratios: Sequence[int], **unit):
        super().__init__(*(WindowUnit(dim, num_heads, ratio=ratio, **unit) for ratio in ratios))

    def forward(
        self, input: Float[Tensor, "B C H W"], *biases: Float[Tensor, "heads N N"]
    ) -> Float[Tensor, "B C H W"]:
        for unit, bias in zip(self.units(), biases, strict=True):
            input = unit(input, bias)
        return input

    def units(self) -> list[WindowUnit]:
        """Return the units in the order in which they run."""
        return list(cast(Iterable[WindowUnit], self))


class FittedStage(Stage):
    """A stage whose blocks need sides that `multiple` divides.

    Any other map is enlarged to the next multiple (nearest cells), and resized back at the end.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module):
        super().__init__(blocks, downsample)
        self.multiple = 1

    def set_window(self, window: int) -> None:
        """Set the side of the windows; a stage without attention has nothing to set."""
        units = [unit for block in self._window_blocks() for unit in block.units()]
        for unit in units:
            unit.position.set_window(window)
        if units:
            self.multiple = window * max(unit.ratio for unit in units)

    def extra_inputs(self) -> Iterable[Sequence[Tensor]]:
        """Compute the position biases of each block's units, for all blocks at once."""
        if not (blocks := self._window_blocks()):
            return super().extra_inputs()
        units = [unit for block in blocks for unit in block.units()]
        biases = iter(compute_together([unit.position for unit in units]))
        return [list(islice(biases, len(block))) for block in blocks]

    def _window_blocks(self) -> list[WindowBlock]:
        return [block for block in self.blocks if isinstance(block, WindowBlock)]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        rows, cols = x.shape[-2:]
        fitted = (math.ceil(n / self.multiple) * self.multiple for n in (rows, cols))
        x = super().forward(resize_nearest(x, *fitted))
        return resize_nearest(x, rows, cols)


class Neck(nn.Module):
    """The sum of the stages' maps from stage `start` on, at that stage's grid and one width."""

    def __init__(self, widths: Sequence[int], dim: int, *, start: int):
        super().__init__()
        self.start = start
        self.projections = nn.ModuleList(
            nn.Identity()
            if k == 0 and width == dim
            else nn.Sequential(
                ConvNorm(width, width, groups=width, bias=True), nn.Conv2d(width, dim, 1)
            )
            for k, width in enumerate(widths[start:])
        )

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "B D H W"]:
        """Sum `maps`: those of stage `start` and of all stages after it."""
        grid = maps[0].shape[-2:]
        dense = self.projections[0](maps[0])
        for project, x in zip(self.projections[1:], maps[1:], strict=True):
            dense = dense + project(resize_nearest(x, *grid))
        return dense


class Levels(FeatureInfo):
    """timm's table of levels, whose last one may be finer than the one before it.

    timm asserts that strides never fall from level to level; that of the dense map does.
    """

    def __init__(self, levels: list[dict[str, Any]], out_indices: int | Sequence[int]):
        chosen = out_indices if isinstance(out_indices, int) else tuple(out_indices)
        super().__init__(levels[:-1], chosen)
        self.info = levels

    def from_other(self, out_indices: int | Sequence[int]) -> "Levels":
        """Return a copy of the table for other output levels."""
        return Levels(copy.deepcopy(self.info), out_indices)


def _window_for(sides: tuple[int, int]) -> int:
    """Return the largest divisor of a side's cells at stride 32; of two, the less wasteful one."""
    cells = [math.ceil(side / STRIDE) for side in sides]
    best = {max(w for w in range(1, MAX_WINDOW + 1) if count % w == 0) for count in cells}
    # A window of one cell attends to nothing, so it is for maps of one cell.
    best = best if max(cells) == 1 else best - {1}
    if not best:
        raise ValueError(
            f"An image of {sides[0]}x{sides[1]} has {cells[0]}x{cells[1]} cells at stride "
            f"{STRIDE}, which no window from 2 to {MAX_WINDOW} divides. Give window_size as well "
            f"(such as {MAX_WINDOW}: the maps are then interpolated), or another size."
        )
    return min(best, key=lambda w: (math.prod(math.ceil(c / w) * w for c in cells), -w))


class ERadio(Hierarchy):
    """E-RADIO (AM-RADIO, 2312.06709): a hierarchy with a neck that gives one dense map.

    Levels 0 to 3 of `forward_intermediates` are the stages; level 4 is the neck's dense map,
    which is computed only on request: `forward_intermediates(x, [-1])`, or
    `return_full_features`. RADIO's wrapper takes the dense map as its spatial features and the
    **mean of the dense map** as its summary; it does not use the pooled map that the classifier
    gets.

    Args:
        num_heads: Heads of the two attention stages.
        trained_window: Side of the windows that the weights were trained with; it stays the
            unit of the position biases when `window_size` or `img_size` choose another.
        bias_hidden: Hidden width of the position bias MLPs.
        light: Depthwise instead of dense 3x3 convolutions before attention, pooling and
            repetition instead of strided convolutions around it.
        sr_ratios: For each attention stage, the reductions of the map that each block attends at.
        neck_start: First stage in the dense map, which gets its grid.
        window_size: Side of the windows; `trained_window` if neither this nor `img_size` is given.
        img_size: Choose the windows for images of this size, as `set_input_size` does. Other
            sizes still run.
        pad_input: Take sides that are no multiples of 32: zeros are appended at the right and
            the bottom, and every map is cropped to the cells that touch the image. Zeros count
            in the pooled features.
        return_full_features: Let `forward` return (logits, dense map), as published.

    Raises:
        ValueError: widths do not split into heads, or no window fits `img_size`. In `forward`:
            a side is no multiple of 32.
    """

    no_decay = ("position.mlp",)
    published = r"^(base_model\.)?(patch_embed|levels|high_res_neck)\."

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        dim: int,
        num_heads: tuple[int, int],
        *,
        in_dim: int,
        neck_dim: int,
        neck_start: int = 2,
        trained_window: int = 16,
        bias_hidden: int = 512,
        light: bool = False,
        sr_ratios: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 1), (1,)),
        window_size: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        pad_input: bool = False,
        return_full_features: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.pad_input, self.return_full_features = pad_input, return_full_features
        widths = [dim * 2**i for i in range(4)]
        rates = drop_path_rates(drop_path_rate, depths)
        unit = dict(window=trained_window, bias_hidden=bias_hidden, light=light)
        blocks = [[SplitConv(widths[i], depths[i])] for i in range(2)] + [
            [WindowBlock(width, heads, ratios, drop_path=rate, **unit) for rate in stage_rates]
            for width, heads, ratios, stage_rates in zip(
                widths[2:], num_heads, sr_ratios, rates[2:], strict=True
            )
        ]
        steps = [*(ConvNorm(a, b, stride=2) for a, b in pairwise(widths)), nn.Identity()]
        self._assemble(
            Stem(in_chans, in_dim, dim, pad_input=pad_input),
            [FittedStage(*parts) for parts in zip(blocks, steps, strict=True)],
            dim,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.neck: Neck | None = Neck(widths, neck_dim, start=neck_start)
        dense = dict(num_chs=neck_dim, reduction=4 * 2**neck_start, module="neck", index=4)
        self.feature_info = Levels([*self.feature_info, dense], (0, 1, 2, 3, 4))
        if img_size is None and window_size is None:
            window_size = trained_window
        self.set_input_size(img_size, window_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | None = None,
    ) -> None:
        """Choose windows of `window_size`, or those that suit images of `img_size`.

        As published: the largest divisor of side / 32 up to 16. Where the two sides disagree, the
        one of their windows that enlarges the maps least. All sizes still run afterwards, and
        weights load into models with other windows.

        Raises:
            ValueError: `img_size` is off the grid of 32 (see `pad_input`), no window fits it, or
                neither argument was given.
        """
        if img_size is None and window_size is None:
            raise ValueError("Neither img_size nor window_size was given; give one of them.")
        if window_size is not None and window_size < 1:
            raise ValueError(
                f"window_size is {window_size}; windows have at least one cell a side."
            )
        if img_size is not None:
            sides = rows_and_cols(img_size)
            if not self.pad_input:
                _check_sides(*sides)
            if window_size is None:
                window_size = _window_for(sides)
        for stage in self.stages:
            assert isinstance(stage, FittedStage) and window_size
            stage.set_window(window_size)

    def _levels(self, indices: int | list[int] | None) -> tuple[list[int], Neck | None]:
        """Return the levels to take, in order, and the neck if the dense map is one of them."""
        num_levels = len(self.stages) + (self.neck is not None)
        take, last = feature_take_indices(num_levels, indices)
        return sorted(set(take)), self.neck if last == len(self.stages) else None

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the stages before down-sampling, and the dense map as the last level.

        Args:
            indices: Levels to return: a list (`[-1]` for the dense map alone), the last so many
                (an int), or all (`None`).
            norm: Apply the final norm to the last stage's map (the dense map has none).
        """
        take, neck = self._levels(indices)
        top = len(self.stages) - 1
        fused = [] if neck is None else list(range(neck.start, top + 1))
        stages = sorted({*fused, *take} - {top + 1})
        result = super().forward_intermediates(
            x, stages, False, stop_early, output_fmt, intermediates_only
        )
        maps = cast(list[Tensor], result if intermediates_only else result[1])
        found = dict(zip(stages, maps, strict=True))
        if neck is not None:
            found[top + 1] = neck([found[i] for i in fused])
        if norm and top in take:
            found[top] = self.norm(found[top])
        maps = [self._cropped(found[i], x, self.feature_info[i]["reduction"]) for i in take]
        return maps if intermediates_only else (result[0], maps)

    def _cropped(self, level: Tensor, x: Tensor, reduction: int) -> Tensor:
        """Crop the cells that cover nothing but the padding of `pad_input`."""
        rows, cols = (math.ceil(side / reduction) for side in x.shape[-2:])
        return level[..., :rows, :cols] if self.pad_input else level

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` does not need for `indices`.

        Without the dense map `forward` returns no pair any more.
        """
        take, neck = self._levels(indices)
        stages = take if neck is None else [len(self.stages) - 1]
        super().prune_intermediate_layers(stages, prune_norm, prune_head)
        if neck is None:
            self.neck, self.return_full_features = None, False
        return take

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # optionally a pair
        self, x: Float[Tensor, "B C H W"]
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.return_full_features:
            return super().forward(x)
        last, (dense,) = self.forward_intermediates(x, [-1])
        return self.forward_head(last), dense

    def load_pretrained(self, path: str | Path) -> None:
        """Load a published file, strictly; timm calls this for `pretrained=True`.

        Raises:
            ValueError: the file is damaged or could run code.
        """
        self.load_state_dict(checkpoint_filter_fn(read_state(path), self))

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys, which have the prefix `base_model.` in files of RADIO's wrapper.

        The wrapper has identities in place of final norm and classifier, so its files hold neither:
        this model keeps its own.
        """
        wrapped = {
            key.removeprefix("base_model."): value
            for key, value in state.items()
            if key.startswith("base_model.")
        }
        ours = rename_keys(wrapped or state, RENAMES, drop=COMPUTED)
        if wrapped:
            kept = {k: v for k, v in self.state_dict().items() if k.startswith(("norm.", "head."))}
            ours = kept | ours
        return ours


def _with_norms(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Return the two entries of a convolution and its batch norm."""
    return (rf"^{theirs}\.conv\.", rf"{ours}.conv."), (rf"^{theirs}\.bn\.", rf"{ours}.norm.")


_UNIT = r"levels\.(\d)\.blocks\.(\d+)\.attention_blocks\.(\d)"
_OURS = r"stages.\1.blocks.\2.\3"

RENAMES = (
    *_with_norms(r"patch_embed\.conv_down\.0", r"stem.0"),
    *_with_norms(r"patch_embed\.conv_down\.2", r"stem.1"),
    *_with_norms(r"levels\.(\d)\.downsample\.reduction", r"stages.\1.downsample"),
    *_with_norms(r"levels\.(\d)\.blocks\.cv1", r"stages.\1.blocks.0.enter"),
    *_with_norms(r"levels\.(\d)\.blocks\.cv2", r"stages.\1.blocks.0.leave"),
    *_with_norms(r"levels\.(\d)\.blocks\.m\.(\d+)\.cv1", r"stages.\1.blocks.0.bottlenecks.\2.0"),
    *_with_norms(r"levels\.(\d)\.blocks\.m\.(\d+)\.cv2", r"stages.\1.blocks.0.bottlenecks.\2.1"),
    *_with_norms(rf"{_UNIT}\.pre_conv", rf"{_OURS}.enter"),
    *_with_norms(rf"{_UNIT}\.downsample_mixer", rf"{_OURS}.enter.1"),  # of the light ones
    *_with_norms(rf"{_UNIT}\.upsample_op", rf"{_OURS}.leave.1"),
    (rf"^{_UNIT}\.downsample_op\.", rf"{_OURS}.enter."),
    (rf"^{_UNIT}\.upsample_op\.", rf"{_OURS}.leave."),
    (rf"^{_UNIT}\.attn\.pos_emb_funct\.cpb_mlp\.", rf"{_OURS}.position.mlp."),
    (rf"^{_UNIT}\.", rf"{_OURS}."),
    (r"^high_res_neck\.neck_features_proj\.(\d)\.conv1\.", r"neck.projections.\1.0.conv."),
    (r"^high_res_neck\.neck_features_proj\.(\d)\.norm\.", r"neck.projections.\1.0.norm."),
    (r"^high_res_neck\.neck_features_proj\.(\d)\.conv2\.", r"neck.projections.\1.1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
"""Theirs -> ours."""

COMPUTED = r"\.(relative_coords_table|relative_position_index|relative_bias)$"
"""Tables in published files that we compute."""


def _eradio(size: str, pretrained: bool, **kwargs) -> nn.Module:
    name, sizes = f"eradio_{size}", SIZES[size] | kwargs
    return build(ERadio, name, pretrained, filter_fn=checkpoint_filter_fn, **sizes)


@register_model
def eradio_l(pretrained: bool = False, **kwargs) -> nn.Module:
    """E-RADIO-L: 391.1 M parameters, 179.8 GMACs at 512. Its weights are for research only."""
    return _eradio("l", pretrained, **kwargs)


@register_model
def eradio_xxxtiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """The smallest published E-RADIO: 10.5 M parameters, 4.33 GMACs at 256; no weights."""
    return _eradio("xxxtiny", pretrained, **kwargs)


@register_model
def eradio_xxxtiny_8x_ws12(pretrained: bool = False, **kwargs) -> nn.Module:
    """A light variant with windows of 12: 6.5 M parameters, 1.88 GMACs at 384; no weights."""
    return _eradio("xxxtiny_8x_ws12", pretrained, **kwargs)


@register_model
def eradio_xxxtiny_8x_ws16(pretrained: bool = False, **kwargs) -> nn.Module:
    """A light variant, dense map at stride 8: 6.5 M parameters, 3.94 GMACs at 512; no weights."""
    return _eradio("xxxtiny_8x_ws16", pretrained, **kwargs)


@register_model
def eradio_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """A laptop's E-RADIO for images of 128: 0.75 M parameters. Ours; nobody published it.

    A feature backbone: without `num_classes` it has no classifier.
    """
    return _eradio("nano", pretrained, **kwargs)


@register_model
def eradio_large_fullres_ws16(pretrained: bool = False, **kwargs) -> nn.Module:
    """Build `eradio_l` under its published name."""
    return eradio_l(pretrained, **kwargs)


@register_model
def eradio(pretrained: bool = False, **kwargs) -> nn.Module:
    """Build `eradio_l` under its other published name."""
    return eradio_l(pretrained, **kwargs)
