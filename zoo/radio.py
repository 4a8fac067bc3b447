"""RADIO: one vision transformer in the place of several teachers (AM-RADIO, 2312.06709).

The transformer is timm's. Added here: one summary token for each teacher, position embeddings for
any image size, adaptors to the teachers' own features, windowed attention (ViTDet), feature
normalisers, spectral reparametrisation, and the loading of NVIDIA's files.

Names are `radio_vit_{size}_patch{p}` with size base, large, so400m, huge or giant (`giant` with
patch 14 is DINOv2's); the release is the tag: `.c_radio_v4`, `.c_radio_v3`, `.c_radio_v2`,
`.c_radio_v2_vlm` (NVIDIA Open Model License), `.radio_v2_5`, `.radio_v2_5_norm`, `.radio_v2_1`,
`.radio_v2`, `.radio_v1` (non-commercial). Without a tag a model has the plain form of its
size; a tag, or a file, adds what its release has (layer scale, number of tokens, ...).

To a timm user it is a `VisionTransformer`: `forward_features` returns prefix and patch tokens,
`forward` the first summary token (`global_pool="token"`) through the classifier, if there is one.
`radio` returns what RADIO's own users know: `RadioOutput(summary, features)`. Images are in [0, 1]
either way: the model normalises them (so `pretrained_cfg` has mean 0 and std 1), until
`make_preprocessor_external` removes that step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import GluMlp, PatchEmbed, SwiGLUPacked
from timm.models import adapt_input_conv, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo import axes
from zoo.adaptors import Adaptor
from zoo.build import build
from zoo.layers import spectral
from zoo.layers.attention import check_heads
from zoo.layers.checkpointed import checkpointed
from zoo.layers.feature_norm import FeatureNormalizer, InputConditioner, IntermediateNormalizer
from zoo.layers.patch_position import cropped_positions, draw_crops, resized_positions
from zoo.layers.vitdet import VitDet, to_raster_order, to_window_order
from zoo.licence import log_licence
from zoo.radio_weights import architecture, is_published, translated
from zoo.weights import check_keys, read_checkpoint

__all__ = ["Radio", "RadioOutput", "checkpoint_filter_fn"]

SIZES: dict[str, dict[str, Any]] = {
    "base_patch16": dict(embed_dim=768, depth=12, num_heads=12),
    "large_patch16": dict(embed_dim=1024, depth=24, num_heads=16, init_values=1e-5),
    "so400m_patch16": dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=4304 / 1152),
    "huge_patch16": dict(embed_dim=1280, depth=32, num_heads=16),
    "giant_patch16": dict(embed_dim=1536, depth=40, num_heads=24),
    "huge_patch14": dict(
        embed_dim=1280, depth=32, num_heads=16, patch_size=14, img_size=378, max_img_size=1050
    ),
    "giant_patch14": dict(
        embed_dim=1536,
        depth=40,
        num_heads=24,
        patch_size=14,
        img_size=896,
        max_img_size=2044,
        patch_bias=True,
        init_values=1e-5,
        mlp_ratio=2.66667 * 2,
        mlp_layer=SwiGLUPacked,
        act_layer=nn.SiLU,
    ),
}

SHAPES = """
[zoo.Radio] C>embed_dim #blocks>depth
cls_token                   _, _, C
reg_token                   _, _, C
pos_embed                   _, _, C
summary_idxs                _
patch_embed.proj.weight     C, _, _, _
head.weight                 _, C
input_conditioner.norm_mean _, _, _
input_conditioner.norm_std  _, _, _
feature_normalizer.mean     C
feature_normalizer.tx       o, @C
intermediate_normalizer.alphas      _
intermediate_normalizer.means       _, C
intermediate_normalizer.rotation    i, @C
intermediate_normalizer.rotation    _, i, @C
"""
axes.register(SHAPES)

OPEN, RESEARCH = "nvidia-open-model-license", "nscl-nc"


class Release(NamedTuple):
    """One published set of weights, and how its model differs from the size's plain form."""

    size: int
    """Preferred side of the images."""
    licence: str
    repo: str
    file: str = "model.safetensors"
    model: Mapping[str, Any] = {}


# Weights made before July 2025 resized positions with aligned corners.
_OLD = dict(align_corners=True)

RELEASES: dict[str, Release] = {
    "base_patch16.c_radio_v3": Release(
        512, OPEN, "nvidia/C-RADIOv3-B", model=_OLD | dict(init_values=1e-5)
    ),
    "base_patch16.radio_v2_5": Release(768, RESEARCH, "nvidia/RADIO-B", model=_OLD),
    "large_patch16.c_radio_v3": Release(512, OPEN, "nvidia/C-RADIOv3-L"),
    "large_patch16.radio_v2_5": Release(768, RESEARCH, "nvidia/RADIO-L", model=_OLD),
    "so400m_patch16.c_radio_v4": Release(
        512, OPEN, "nvidia/C-RADIOv4-SO400M", model=dict(reg_tokens=9)
    ),
    "huge_patch16.c_radio_v4": Release(512, OPEN, "nvidia/C-RADIOv4-H", model=dict(reg_tokens=9)),
    "huge_patch16.c_radio_v3": Release(512, OPEN, "nvidia/C-RADIOv3-H", model=_OLD),
    "huge_patch16.c_radio_v2_vlm": Release(768, OPEN, "nvidia/C-RADIOv2-VLM-H", model=_OLD),
    "huge_patch16.radio_v2_5": Release(768, RESEARCH, "nvidia/RADIO-H", model=_OLD),
    # These have no safetensors repository of their own that we know of: give the file.
    "huge_patch16.radio_v2_5_norm": Release(
        768, RESEARCH, "", model=_OLD | dict(feature_normalizer=True)
    ),
    "huge_patch16.radio_v2_1": Release(768, RESEARCH, "", model=_OLD),
    "huge_patch16.radio_v2": Release(768, RESEARCH, "", model=_OLD),
    "huge_patch14.radio_v1": Release(378, RESEARCH, "", model=_OLD),
    "giant_patch16.c_radio_v3": Release(512, OPEN, "nvidia/C-RADIOv3-g"),
    "giant_patch16.c_radio_v2": Release(768, OPEN, "nvidia/C-RADIOv2-g", model=_OLD),
    "giant_patch14.radio_v2_5": Release(896, RESEARCH, "nvidia/RADIO-g", model=_OLD),
}


def _cfg(release: Release) -> dict[str, Any]:
    return {
        "url": "",
        "hf_hub_id": release.repo or None,
        "hf_hub_filename": release.file if release.repo else None,
        "num_classes": 0,
        "input_size": (3, release.size, release.size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": release.licence,
        "origin_url": "https://github.com/NVlabs/RADIO",
        "paper_ids": "arXiv:2312.06709",
    }


default_cfgs = generate_default_cfgs(
    {f"radio_vit_{name}": _cfg(release) for name, release in RELEASES.items()}
)


class RadioOutput(NamedTuple):
    """What RADIO, or one teacher's adaptor, returns for a batch."""

    summary: Float[Tensor, "B D"] | None
    features: Float[Tensor, "B N C"] | Float[Tensor, "B C H W"] | None


class Radio(VisionTransformer):
    """A vision transformer with a summary token for each teacher (AM-RADIO, 2312.06709).

    It takes any image whose sides are multiples of `resolution_step`.

    Args:
        img_size: Nominal; other sizes run too.
        max_img_size: Side of the largest image, which the grid of positions covers; a larger one
            gets stretched positions.
        reg_tokens: Number of prefix tokens after the first. `summary_idxs` says which of the prefix
            tokens are summaries; the others are registers. `zoo.radio_weights.prefix_layout`
            counts both for a list of teachers.
        align_corners: How positions are resized at inference; see `resized_positions`.
        crop_positions: In training, give each image a random window of the grid.
        pos_dropout: In training, the probability that an image gets no positions at all.
        patch_bias: The patch embedding has a bias (models that started from DINOv2).
        vitdet: Arguments of `VitDet`: windowed attention in most blocks. The attribute of that
            name may be replaced between calls, by a `VitDet` or `None`.
        adaptors: For each teacher by name, `dict(token=..., summary=..., feature=...)`: its prefix
            token, and the sizes of its heads as arguments of `zoo.adaptors.Head`.
        feature_normalizer: Put a fixed transform behind the patch tokens.
        intermediate_normalizer: "common" or "per_layer" rotation: normalise what
            `forward_intermediates` returns.

    Raises:
        ValueError: `embed_dim` does not split into `num_heads`. In `forward` and its kin: a side
            is no multiple of `resolution_step`.
    """

    summary_idxs: Tensor
    pretrained_cfg: dict[str, Any]
    build_args: dict[str, Any]
    """What the release and the file added; an export must record it beside the user's own."""

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 512,
        patch_size: int = 16,
        max_img_size: int = 2048,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        reg_tokens: int = 7,
        summary_idxs: Sequence[int] = (0, 1, 2),
        align_corners: bool = False,
        crop_positions: bool = True,
        pos_dropout: float = 0.1,
        patch_bias: bool = False,
        vitdet: Mapping[str, int] | None = None,
        adaptors: Mapping[str, Mapping[str, Any]] | Sequence[str] | None = None,
        feature_normalizer: bool = False,
        intermediate_normalizer: str | None = None,
        device=None,
        dtype=None,
        **vit,
    ):
        check_heads(embed_dim, num_heads)
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            reg_tokens=reg_tokens,
            class_token=True,
            pos_embed="none",  # ours is a grid of another size than the image's
            final_norm=False,
            dynamic_img_size=True,
            embed_layer=partial(_patch_embed, patch_bias),
            **vit,
            **like,
        )
        self.depth = depth  # blocks may be pruned later; the schedule of windows stays
        self.vitdet = VitDet(**vitdet) if vitdet else None
        self.align_corners = align_corners
        self.crop_positions, self.pos_dropout, self.frames_per_crop = crop_positions, pos_dropout, 1
        self._add_tokens((max_img_size // patch_size) ** 2, summary_idxs, like)
        self._add_transforms(feature_normalizer, intermediate_normalizer, like)
        self._add_adaptors(adaptors or {}, like)
        self.register_load_state_dict_pre_hook(_translate_on_load)

    def _add_tokens(self, cells: int, summary_idxs: Sequence[int], like: dict[str, Any]) -> None:
        for token in summary_idxs:
            _check_token(token, self.num_prefix_tokens)
        summaries = torch.tensor(list(summary_idxs), dtype=torch.long, device=like["device"])
        self.register_buffer("summary_idxs", summaries)
        self.pos_embed = nn.Parameter(torch.empty(1, cells, self.embed_dim, **like))
        for table in (self.pos_embed, self.cls_token, self.reg_token):
            if table is not None:
                nn.init.normal_(table, std=self.embed_dim**-0.5)

    def _add_transforms(
        self, feature: bool, intermediate: str | None, like: dict[str, Any]
    ) -> None:
        # CLIP's statistics; for other channels than red, green and blue, their mean.
        mean, std = (
            stats if self.in_chans == 3 else [sum(stats) / len(stats)] * self.in_chans
            for stats in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        self.input_conditioner: nn.Module = InputConditioner(mean, std, **like)
        self.feature_normalizer = FeatureNormalizer(self.embed_dim, **like) if feature else None
        if intermediate not in (None, "common", "per_layer"):
            raise ValueError(
                f"intermediate_normalizer is {intermediate!r}; give 'common' or 'per_layer'."
            )
        self.intermediate_normalizer = intermediate and IntermediateNormalizer(
            self.depth, self.embed_dim, per_layer=intermediate == "per_layer", **like
        )

    def _add_adaptors(
        self, adaptors: Mapping[str, Any] | Sequence[str], like: dict[str, Any]
    ) -> None:
        if not isinstance(adaptors, Mapping):
            raise ValueError(
                f"Adaptors {list(adaptors)} come by name, but no file to read their sizes from. "
                "Give one (pretrained=True), or adaptors={name: dict(token=..., summary=...)}."
            )
        self.adaptors = nn.ModuleDict()
        for name, sizes in adaptors.items():
            _check_token(sizes["token"], self.num_prefix_tokens)
            self.adaptors[name] = Adaptor(self.embed_dim, **sizes).to(**like)

    @property
    def summary_dim(self) -> int:
        """Width of the backbone's summary: all its summary tokens concatenated."""
        return self.embed_dim * len(self.summary_idxs)

    @property
    def resolution_step(self) -> int:
        """Number of pixels that the sides of an image must be multiples of."""
        return self.patch_embed.patch_size[0] * (self.vitdet.window if self.vitdet else 1)

    def get_nearest_supported_resolution(self, height: int, width: int) -> tuple[int, int]:
        """Return the nearest size to (`height`, `width`) that the model takes."""
        step = self.resolution_step
        height, width = (max(round(side / step), 1) * step for side in (height, width))
        return height, width

    def make_preprocessor_external(self) -> nn.Module:
        """Remove the normalisation of pixels from the model, and return it.

        From then on the model needs normalised images, and `pretrained_cfg` has their statistics.
        """
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        if isinstance(conditioner, InputConditioner) and hasattr(self, "pretrained_cfg"):
            self.pretrained_cfg.update(
                mean=tuple(conditioner.norm_mean.flatten().tolist()),
                std=tuple(conditioner.norm_std.flatten().tolist()),
            )
        return conditioner

    @contextmanager
    def cpe_video_mode(self, frames: int) -> Iterator[None]:
        """Let `frames` consecutive images of a training batch share one window of positions."""
        before, self.frames_per_crop = self.frames_per_crop, frames
        try:
            yield
        finally:
            self.frames_per_crop = before

    def set_spectral(
        self, enable: bool = True, *, version: int = 2, scale_values: bool = True
    ) -> None:
        """Reparametrise the blocks' weights by their spectral norms, or fold these back in.

        Args:
            scale_values: Also for the value part of `qkv`.
        """
        if not enable:
            spectral.fold(self.blocks)
            return
        glu = [f"{name}.fc1" for name, m in self.blocks.named_modules() if isinstance(m, GluMlp)]
        spectral.reparametrise(self.blocks, version=version, scale_values=scale_values, glu=glu)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Set the nominal size, or resample the patch embedding; the grid of positions stays."""
        grid, self.pos_embed = self.pos_embed, None
        super().set_input_size(img_size, patch_size)
        self.pos_embed = grid

    def _grid_of(self, x: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        height, width = x.shape[-2:]
        step = self.resolution_step
        if height % step or width % step:
            near = self.get_nearest_supported_resolution(height, width)
            raise ValueError(
                f"An image is {height}x{width}; both sides must be multiples of {step}. "
                f"The nearest such size is {near[0]}x{near[1]}."
            )
        patch = self.patch_embed.patch_size
        return height // patch[0], width // patch[1]

    def _positions(self, batch: int, rows: int, cols: int) -> Float[Tensor, "b N C"]:
        grid = cast(nn.Parameter, self.pos_embed)  # None only inside `set_input_size`
        full = rows == cols and rows * cols == grid.shape[1]
        if not self.training or full:
            return resized_positions(grid, rows, cols, align_corners=self.align_corners)
        if not self.crop_positions:
            positions = resized_positions(grid, rows, cols, align_corners=self.align_corners)
        elif batch % self.frames_per_crop:
            raise ValueError(
                f"{batch} images do not divide into clips of {self.frames_per_crop} frames."
            )
        else:
            draws = draw_crops(batch // self.frames_per_crop, grid.device)
            positions = cropped_positions(grid, rows, cols, draws)
            positions = positions.repeat_interleave(self.frames_per_crop, dim=0)
        if self.pos_dropout:
            kept = torch.rand(batch, 1, 1, device=grid.device) >= self.pos_dropout
            positions = positions * kept
        return positions

    def _pos_embed(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B T C"]:
        batch, rows, cols, _ = x.shape
        x = x.flatten(1, 2) + self._positions(batch, rows, cols).to(x.dtype)
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat([*(token.expand(batch, -1, -1).to(x.dtype) for token in prefix), x], dim=1)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpointed(block, x) if self.grad_checkpointing else block(x)

    def _after_blocks(
        self, x: Float[Tensor, "B C H W"], wanted: set[int], last: int
    ) -> dict[int, Float[Tensor, "B T D"]]:
        """Embed images and run the blocks up to `last`; return the tokens after the `wanted` ones.

        Prefix tokens come first, then patches in raster order, even if blocks ran in windows.
        """
        rows, cols = self._grid_of(x)
        x = self.norm_pre(
            self.patch_drop(self._pos_embed(self.patch_embed(self.input_conditioner(x))))
        )
        if self.vitdet:
            return self._after_windowed_blocks(x, (rows, cols), self.vitdet, wanted, last)
        tokens = {}
        for i in range(last + 1):
            x = self._run(self.blocks[i], x)
            if i in wanted:
                tokens[i] = x
        return tokens

    def _after_windowed_blocks(
        self,
        x: Float[Tensor, "B T C"],
        grid: tuple[int, int],
        plan: VitDet,
        wanted: set[int],
        last: int,
    ) -> dict[int, Float[Tensor, "B T C"]]:
        prefix, patches = self._split(x)
        patches = to_window_order(patches, *grid, plan.window)
        shape = patches.shape
        windows = (-1, plan.window**2, shape[-1])
        tokens = {}
        for i in range(last + 1):
            block = self.blocks[i]
            if plan.is_global(i, self.depth):
                x = self._run(block, torch.cat([prefix, patches], dim=1))
                prefix, patches = self._split(x)
            else:  # the prefix does not pass through windowed blocks
                patches = self._run(block, patches.reshape(windows)).reshape(shape)
            if i in wanted:
                raster = to_raster_order(patches, *grid, plan.window)
                tokens[i] = torch.cat([prefix, raster], dim=1)
        return tokens

    def _split(self, x: Float[Tensor, "B T C"]) -> tuple[Tensor, Tensor]:
        return x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]

    def _finished(self, x: Float[Tensor, "B T C"], last: int) -> Float[Tensor, "B T C"]:
        x = self.norm(x)
        if self.feature_normalizer is None or last < self.depth - 1:
            return x
        prefix, patches = self._split(x)
        return torch.cat([prefix, self.feature_normalizer(patches)], dim=1)

    def forward_features(  # pyright: ignore[reportIncompatibleMethodOverride]  # no masks
        self, x: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B T D"]:
        """Return prefix and patch tokens, patches through `feature_normalizer` if there is one."""
        last = len(self.blocks) - 1
        return self._finished(self._after_blocks(x, {last}, last)[last], last)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # no masks
        self, x: Float[Tensor, "B C H W"]
    ) -> Tensor:
        """Return the pooled token (`global_pool`), or its logits if there are classes."""
        return self.forward_head(self.forward_features(x))

    def select_summary(self, prefix: Float[Tensor, "B P C"]) -> Float[Tensor, "B D"]:
        """Concatenate the summary tokens among `prefix`."""
        return prefix.index_select(1, self.summary_idxs).flatten(1)

    def radio(
        self, x: Float[Tensor, "B C H W"], feature_fmt: str = "NLC"
    ) -> RadioOutput | dict[str, RadioOutput]:
        """Return the summary and the features of the backbone, and of each adaptor.

        Args:
            feature_fmt: "NLC" or "NCHW".

        Returns:
            The backbone's pair; with adaptors a dict of pairs, with the backbone's under
            `backbone`. Where an adaptor lacks a head, its part is `None`.
        """
        _check_fmt(feature_fmt)
        rows, cols = self._grid_of(x)
        prefix, patches = self._split(self.forward_features(x))

        def shaped(features: Tensor, factor: int = 1) -> Tensor:
            return (
                features
                if feature_fmt == "NLC"
                else _as_map(features, rows * factor, cols * factor)
            )

        backbone = RadioOutput(self.select_summary(prefix), shaped(patches))
        if not self.adaptors:
            return backbone
        outputs = {"backbone": backbone}
        for name, adaptor in self.adaptors.items():
            assert isinstance(adaptor, Adaptor)
            summary, features = adaptor(prefix, patches, rows, cols)
            if features is not None:
                features = shaped(features, adaptor.upsample)
            outputs[name] = RadioOutput(summary, features)
        return outputs

    def forward_intermediates(  # pyright: ignore[reportIncompatibleMethodOverride]  # no masks
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        aggregation: str = "sparse",
        norm_alpha_scheme: str = "post-alpha",
    ) -> list | tuple[Tensor, list] | dict[str, Any]:
        """Return patch tokens after blocks, through `intermediate_normalizer` if there is one.

        Args:
            indices: Blocks: a list, the last so many (an int), or all (`None`).
            return_prefix_tokens: Return pairs (patches, prefix tokens).
            norm: Without an `intermediate_normalizer`, apply the final norm (and, after the last
                block, `feature_normalizer`).
            stop_early: Run no block after the last of `indices`.
            output_fmt: "NLC" or "NCHW".
            intermediates_only: Return the intermediates alone, not a pair of the final tokens and
                these.
            output_dict: Return a dict, as timm names its entries.
            aggregation: "sparse", or "dense": the mean of all blocks since the previous index.
            norm_alpha_scheme: Where a block's scalar enters the mean: "post-alpha" for
                mean(α)·mean(y), "pre-alpha" for mean(α·y), "none" for mean(y).
        """
        _check_fmt(output_fmt)
        take, furthest = feature_take_indices(len(self.blocks), indices)
        groups = _groups(take, aggregation)
        last = furthest if stop_early else len(self.blocks) - 1
        tokens = self._after_blocks(x, {i for group in groups for i in group} | {last}, last)
        finish = norm and self.intermediate_normalizer is None
        pairs = []
        for group in groups:
            members = {i: self._finished(tokens[i], i) if finish else tokens[i] for i in group}
            pairs.append(self._mean_of(members, norm_alpha_scheme))
        if output_fmt == "NCHW":
            pairs = [(_as_map(y, *self._grid_of(x)), prefix) for y, prefix in pairs]
        patches = [y for y, _ in pairs]
        final = None if intermediates_only else self._finished(tokens[last], last)
        if output_dict:
            named = dict(image_intermediates=patches)
            if return_prefix_tokens:
                named["image_intermediates_prefix"] = [prefix for _, prefix in pairs]
            return named if final is None else named | dict(image_features=final)
        intermediates = pairs if return_prefix_tokens else patches
        return intermediates if final is None else (final, intermediates)

    def _mean_of(
        self, tokens: Mapping[int, Float[Tensor, "B T C"]], scheme: str
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B P C"]]:
        """Normalise the tokens after a group of blocks and average them: patches, prefix."""
        _check_scheme(scheme)
        prefixes, patches = zip(*(self._split(x) for x in tokens.values()), strict=True)
        prefix = _mean(prefixes)
        normalizer = self.intermediate_normalizer
        if normalizer is None:
            return _mean(patches), prefix
        layers = list(tokens)
        alphas = normalizer.alphas[layers]
        y = [normalizer.centred(x, i) for i, x in zip(layers, patches, strict=True)]
        if scheme == "pre-alpha":
            y = [alpha * x for alpha, x in zip(alphas, y, strict=True)]
        mean = normalizer.rotated(_mean(y), layers[-1])
        return mean * alphas.mean() if scheme == "post-alpha" else mean, prefix

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that `forward_intermediates` does not need for `indices`."""
        if prune_head:
            self.adaptors = nn.ModuleDict()
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ):
        """Load weights, ours or published.

        Raises:
            ValueError: they do not fit, and `strict`; at most ten keys of each kind are listed.
        """
        if strict:
            check_keys(translated(state_dict, self), self.state_dict(), hint=HINT)
        return super().load_state_dict(state_dict, strict, assign)

    def load_pretrained(self, checkpoint_path: str | Path, prefix: str = "") -> None:
        """Load an official file, or one of ours, strictly; nothing in it is executed.

        A classifier that the file does not have, or has for other classes, stays as it is.

        Raises:
            ValueError: the file is damaged or could run code, or does not fit the model.
        """
        if prefix:
            raise ValueError(
                f"The prefixes of RADIO's files are known; leave the prefix {prefix!r} out."
            )
        state, _ = read_checkpoint(checkpoint_path)
        self.load_state_dict(checkpoint_filter_fn(state, self))


def _patch_embed(patch_bias: bool, **kwargs: Any) -> PatchEmbed:
    kwargs["bias"] = patch_bias
    return PatchEmbed(**kwargs)


def _check_token(token: int, count: int) -> None:
    if not 0 <= token < count:
        raise ValueError(f"There is no token {token}; the prefix has tokens 0 to {count - 1}.")


def _check_fmt(fmt: str) -> None:
    if fmt not in ("NLC", "NCHW"):
        raise ValueError(f"There is no format {fmt!r}; there are NLC and NCHW.")


def _check_scheme(scheme: str) -> None:
    if scheme not in ("post-alpha", "pre-alpha", "none"):
        raise ValueError(
            f"There is no norm_alpha_scheme {scheme!r}; there are post-alpha, pre-alpha, none."
        )


def _groups(take: Sequence[int], aggregation: str) -> list[range]:
    """Return, for each intermediate, the blocks that it is the mean of."""
    if aggregation == "sparse":
        return [range(i, i + 1) for i in take]
    if aggregation != "dense":
        raise ValueError(f"There is no aggregation {aggregation!r}; there are sparse and dense.")
    if sorted(set(take)) != list(take):
        raise ValueError(f"Dense intermediates need ascending indices, not {list(take)}.")
    starts = [0, *(i + 1 for i in take[:-1])]
    return [range(start, i + 1) for start, i in zip(starts, take, strict=True)]


def _mean(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else cast(Tensor, sum(xs)) / len(xs)


def _as_map(x: Float[Tensor, "B N C"], rows: int, cols: int) -> Float[Tensor, "B C h w"]:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], rows, cols)


def _translate_on_load(model: Radio, state: dict, prefix: str, *_) -> None:
    """Translate published keys to ours before they are loaded."""
    theirs = {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
    if is_published(theirs):
        log_licence(model)
    ours = translated(theirs, model)
    if "summary_idxs" in ours:  # as many as the weights have
        model.summary_idxs = ours["summary_idxs"].to(model.summary_idxs.device)
    state.update((prefix + key, value) for key, value in ours.items())


HINT = (
    "Is it a file of another size? A file that is given when the model is built "
    "(pretrained=True, pretrained_cfg_overlay=dict(file=...)) also sets layer scale, tokens and "
    "the grid of positions."
)


def checkpoint_filter_fn(state: Mapping[str, Any], model: Radio) -> dict[str, Tensor]:
    """Translate official weights for `model`, which may have other channels and classes."""
    ours = translated(state, model)
    own = model.state_dict()
    patches = "patch_embed.proj.weight"
    if patches in ours and ours[patches].shape[1] != model.in_chans:
        ours[patches] = adapt_input_conv(model.in_chans, ours[patches])
    for key in own:
        if key.startswith("head.") and (key not in ours or ours[key].shape != own[key].shape):
            ours[key] = own[key]
    return ours


def _tag_of(pretrained_cfg: Any) -> str | None:
    """Return the tag that a user gave, in any of the forms in which timm passes it on."""
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        return pretrained_cfg
    return _as_dict(pretrained_cfg).get("tag")


def _as_dict(pretrained_cfg: Any) -> dict[str, Any]:
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        return {}
    return dict(pretrained_cfg if isinstance(pretrained_cfg, Mapping) else vars(pretrained_cfg))


def _weights(
    size: str, release: Release | None, overlay: dict[str, Any], cache_dir: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Find the weights that `pretrained=True` means: state dict, arguments, changes to the cfg."""
    if overlay.get("state_dict"):
        return overlay["state_dict"], {}, {}
    path = overlay.get("file")
    if not path:
        if release is None or not release.repo:
            raise ValueError(
                f"No weights of radio_vit_{size} are known to be on the hub under this name; give "
                "the file: pretrained_cfg_overlay=dict(file=...)."
            )
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(release.repo, release.file, cache_dir=cache_dir)
    # Its form is ours to read (`load_pretrained`), whatever the reader of timm would do.
    return *read_checkpoint(path), dict(file=str(path), custom_load=True)


def _radio(size: str, pretrained: bool, **kwargs) -> nn.Module:
    """Build a size, with what its release and its file add."""
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    adaptors = kwargs.pop("adaptors", None)
    cfg, tag = _as_dict(kwargs.get("pretrained_cfg")), _tag_of(kwargs.get("pretrained_cfg"))
    found: dict[str, Any] = {}
    # From a folder or repository of ours, timm has the arguments already.
    if pretrained and cfg.get("source") not in ("local-dir", "hf-hub"):
        sources = {key: cfg[key] for key in ("file", "state_dict") if cfg.get(key)} | overlay
        if tag is None and not any(sources.get(key) for key in ("file", "state_dict")):
            tag = next(name for name in RELEASES if name.startswith(f"{size}.")).partition(".")[2]
        release = RELEASES.get(f"{size}.{tag}")
        state, args, changes = _weights(size, release, sources, kwargs.get("cache_dir"))
        found = architecture(state, args, adaptors)
        adaptors = found.get("adaptors")
        overlay |= changes
    if f"{size}.{tag}" in RELEASES:
        release = RELEASES[f"{size}.{tag}"]
        found = dict(img_size=release.size, **release.model) | found
    if adaptors is not None:
        found["adaptors"] = adaptors
    found = {key: kwargs.get(key, value) for key, value in found.items()}
    model = build(
        Radio,
        f"radio_vit_{size}",
        pretrained,
        filter_fn=checkpoint_filter_fn,
        levels=3,
        pretrained_cfg_overlay=overlay,
        **(SIZES[size] | found | kwargs),
    )
    model.build_args = found  # pyright: ignore[reportArgumentType]  # may be wrapped for features
    return model


@register_model
def radio_vit_base_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """RADIO ViT-B/16: 98.2 M parameters."""
    return _radio("base_patch16", pretrained, **kwargs)


@register_model
def radio_vit_large_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """RADIO ViT-L/16, with layer scale: 319.9 M parameters."""
    return _radio("large_patch16", pretrained, **kwargs)


@register_model
def radio_vit_so400m_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """RADIO ViT-SO400M/16: 431.2 M parameters."""
    return _radio("so400m_patch16", pretrained, **kwargs)


@register_model
def radio_vit_huge_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """RADIO ViT-H/16: 651.6 M parameters."""
    return _radio("huge_patch16", pretrained, **kwargs)


@register_model
def radio_vit_giant_patch16(pretrained: bool = False, **kwargs) -> nn.Module:
    """RADIO ViT-g/16: 1159.6 M parameters."""
    return _radio("giant_patch16", pretrained, **kwargs)


@register_model
def radio_vit_huge_patch14(pretrained: bool = False, **kwargs) -> nn.Module:
    """The first RADIO, ViT-H/14: 637.6 M parameters."""
    return _radio("huge_patch14", pretrained, **kwargs)


@register_model
def radio_vit_giant_patch14(pretrained: bool = False, **kwargs) -> nn.Module:
    """RADIO from DINOv2's ViT-g/14 (SwiGLU, layer scale): 1167.1 M parameters."""
    return _radio("giant_patch14", pretrained, **kwargs)
