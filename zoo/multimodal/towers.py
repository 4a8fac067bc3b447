"""Vision towers for transformers' Llava: one network, a mixture of them, or one in their place.

    ZooTower        any backbone of timm, ours among them
    MixtureTower    k of them, each at its own resolution, on one grid, channels joined (Eagle)
    AdaptorTower    one student whose heads, one a teacher, stand in for the k encoders

Eagle (2408.15998) runs k encoders at inference; AM-RADIO (2312.06709) distils k networks into one,
with a head for each whose output has the shape of that network's. So the heads side by side are
what the encoders side by side are, and an `AdaptorTower` takes the place of a `MixtureTower`.

A tower takes pixels in [0, 1], since each network has a mean and a deviation of its own, and
returns [B N C]: the cells of one grid, row by row, and no class token. Each map can be brought to
variance 1 by a fixed affine map, PHI-S's, which the tower keeps (`standardise`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zoo.features import at_grid, gives_class_tokens, read_features, read_intermediates
from zoo.multimodal.budget import check_budget, fit_to_budget
from zoo.multimodal.projector import pixel_shuffle
from zoo.students.heads import TeacherHead
from zoo.students.start import create_backbone


class TowerConfig(PreTrainedConfig):
    """What every tower has."""

    size: int = 224
    """Side of the square image that it was built for, in pixels."""
    stride: int = 16
    """Pixels of one cell of its grid, along each side."""
    shuffle: int = 1
    """Cells of the grid along each side of a token (`zoo.multimodal.projector`)."""
    max_tokens: int = 1024
    """Most tokens of an image."""
    native: bool = False
    """Whether images keep their shape; otherwise each is brought to `size` x `size`."""
    hidden_size: int = 0
    """Channels of a token: what the projector takes."""
    image_size: int = 224
    """As `size`, by transformers' name."""
    patch_size: int = 16
    """Pixels of a token along each side, by transformers' name: stride · shuffle."""
    multiple: int = 16
    """What the sides of an image are multiples of, in pixels; the network may want more than whole
    tokens."""
    license: str | None = None
    """Of the weights that it started from."""

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of pixels that an image is brought to."""
        if not self.native:
            return self.size, self.size
        least = (self.multiple // self.patch_size) ** 2
        return fit_to_budget(height, width, self.multiple, self.max_tokens // least)


class ZooTowerConfig(TowerConfig):
    """One backbone, by its name in timm."""

    model_type = "zoo_tower"

    backbone: str = ""
    options: dict[str, Any] | None = None
    """Keywords of `timm.create_model`, plain values only."""
    mean: list[float] | None = None
    std: list[float] | None = None
    width: int = 0
    """Channels of its map."""
    joined: int | None = None
    """Channels that are left of it behind the affine map, of a cut tower."""
    balanced: bool = False
    """Whether it has an affine map that brings its features to variance 1."""


class MixtureTowerConfig(TowerConfig):
    """Several towers on one grid."""

    model_type = "zoo_mixture_tower"

    towers: list[dict[str, Any]] | None = None
    """Their configurations; each sees the image at its own `size`."""


class AdaptorTowerConfig(TowerConfig):
    """A student of `zoo distill` with its heads."""

    model_type = "zoo_adaptor_tower"

    backbone: str = ""
    options: dict[str, Any] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    heads: list[dict[str, Any]] | None = None
    """Of each teacher, in the order in which they are joined: its `teacher`, and what builds its
    head. `joined`, of a cut tower: channels that are left of its map behind the affine map. No
    dict: transformers writes keys in the order of the alphabet."""
    balanced: bool = False


class UnitVariance(nn.Module):
    """A fixed affine map z = W (x - μ), as PHI-S fits it (2410.01680); the identity at first.

    Args:
        width: Channels of x.
        out: Channels of z: fewer than `width` after a cut.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, width: int, out: int | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("weight", torch.eye(out or width, width))

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        # In bf16 the centring alone would lose the small channels of a network with large means.
        device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(self.mean.dtype) - self.mean, self.weight)

    def set(self, mean: Tensor, weight: Tensor) -> None:
        """Take μ [C], and W as a matrix [C C] or as its diagonal [C].

        Raises:
            ValueError: they are of another width.
        """
        if len(mean) != len(self.mean):
            raise ValueError(
                f"The statistics are of {len(mean)} channels, and the tower's map has "
                f"{len(self.mean)}."
            )
        self.mean.copy_(mean)
        self.weight.copy_(weight if weight.ndim == 2 else weight.diag())


class Tower(PreTrainedModel):
    """What transformers' Llava asks of a vision tower; each kind says how its map is made."""

    config_class: Any = TowerConfig
    main_input_name = "pixel_values"
    pixel_mean: Tensor
    pixel_std: Tensor
    _no_split_modules: Any = ()
    # timm chooses itself how a network computes attention; what is asked for is the language's
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Compute the tables that no file holds; timm has initialised everything else."""
        tables = getattr(module, "init_non_persistent_buffers", None)
        if tables is not None:
            tables()

    def maps(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B y x _"]]:
        """Return the maps that are joined, before the affine maps of `balances`, in any grid."""
        raise NotImplementedError

    @property
    def balances(self) -> Sequence[nn.Module]:
        """The affine map of each of `maps`: a `UnitVariance`, or nothing (`nn.Identity`)."""
        raise NotImplementedError

    def networks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return names and keywords that timm builds the networks inside by, by their paths."""
        raise NotImplementedError

    def resized(
        self, keywords: Mapping[str, Mapping[str, Any]], widths: Mapping[str, int]
    ) -> TowerConfig:
        """Return the configuration of a tower that was cut.

        Args:
            keywords: Of `timm.create_model`, for each of `networks`.
            widths: What the table of named shapes says of other widths, by path and name.
        """
        raise NotImplementedError

    @property
    def output_shape(self) -> str:
        """What the channels of a token are made of, as a table of named shapes writes it."""
        return " | ".join(list(self.output_axes) * self.config.shuffle**2)

    @property
    def output_axes(self) -> Sequence[str]:
        """The axis of each of the maps that are joined."""
        raise NotImplementedError

    def standardise(self, fitted: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take μ and W for each of `maps`, so that its features have variance 1.

        Raises:
            ValueError: a width or their number is wrong, or the tower was built without.
        """
        places = [b for b in self.balances if isinstance(b, UnitVariance)]
        if len(places) != len(fitted):
            raise ValueError(
                f"There are statistics of {len(fitted)} maps, and the tower has {len(places)} to "
                "bring to variance 1; build it with balanced=True."
            )
        for place, (mean, weight) in zip(places, fitted, strict=True):
            place.set(mean, weight)

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        """Return the tokens of images in [0, 1] on their grid.

        Raises:
            ValueError: an image is beyond the budget, or does not fall into whole tokens.
        """
        config, (height, width) = self.config, pixels.shape[-2:]
        check_budget(height, width, config.patch_size, config.max_tokens)
        grid = (height // config.stride, width // config.stride)
        joined = [
            balance(at_grid(x, grid))
            for x, balance in zip(self.maps(pixels), self.balances, strict=True)
        ]
        return pixel_shuffle(
            joined[0] if len(joined) == 1 else torch.cat(joined, -1), config.shuffle
        )

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return the tokens [B N C], as `last_hidden_state` and as the one hidden state."""
        tokens = self.features(pixel_values).flatten(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


class ZooTower(Tower):
    """A backbone of timm; weights are random until they are loaded or handed over."""

    config_class = ZooTowerConfig

    def __init__(self, config: ZooTowerConfig, backbone: nn.Module | None = None):
        super().__init__(config)
        self.backbone: Any = backbone or _build(config)
        self.balance = _balance(config.balanced, config.width, config.joined)
        _keep_pixels(self, config)
        self.post_init()

    def maps(self, pixels: Tensor) -> list[Tensor]:
        return [_last_map(self.backbone, (pixels - self.pixel_mean) / self.pixel_std)]

    @property
    def balances(self) -> Sequence[nn.Module]:
        return [self.balance]

    def networks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {"backbone": (self.config.backbone, dict(self.config.options or {}))}

    def resized(
        self, keywords: Mapping[str, Mapping[str, Any]], widths: Mapping[str, int]
    ) -> ZooTowerConfig:
        about: dict[str, Any] = self.config.to_dict() | dict(options=dict(keywords["backbone"]))
        about |= dict(width=widths.get("width", self.config.width), joined=widths.get("joined"))
        about["hidden_size"] = (about["joined"] or about["width"]) * self.config.shuffle**2
        return ZooTowerConfig(**about)

    @property
    def output_axes(self) -> Sequence[str]:
        return ["o"]


class MixtureTower(Tower):
    """Eagle's mixture (2408.15998, section 2.3): channels joined on one grid.

        V = [U(E_1(x)), ..., U(E_k(x))],    U: to the common grid, bilinear

    Encoder i sees the image resized by `size_i / size`, each side to a multiple of its cells.
    """

    config_class = MixtureTowerConfig

    def __init__(self, config: MixtureTowerConfig, towers: Sequence[ZooTower] = ()):
        super().__init__(config)
        built = towers or [ZooTower(ZooTowerConfig(**each)) for each in config.towers or ()]
        self.towers = nn.ModuleList(built)
        self.post_init()

    def maps(self, pixels: Tensor) -> list[Tensor]:
        height, width = pixels.shape[-2:]
        found, resized = [], {(height, width): pixels}
        for tower in self._each():
            cell, scale = tower.config.stride, tower.config.size / self.config.size
            size = tuple(max(1, round(side * scale / cell)) * cell for side in (height, width))
            if size not in resized:
                resized[size] = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(
                    0, 1
                )
            found += tower.maps(resized[size])
        return found

    def _each(self) -> Sequence[Any]:
        return list(self.towers)

    @property
    def balances(self) -> Sequence[nn.Module]:
        return [tower.balance for tower in self._each()]

    def networks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {
            f"towers.{i}.{path}": recipe
            for i, tower in enumerate(self._each())
            for path, recipe in tower.networks().items()
        }

    def resized(
        self, keywords: Mapping[str, Mapping[str, Any]], widths: Mapping[str, int]
    ) -> MixtureTowerConfig:
        each: list[Any] = [
            tower.resized(_inside(keywords, f"towers.{i}."), _inside(widths, f"towers.{i}."))
            for i, tower in enumerate(self._each())
        ]
        about: dict[str, Any] = self.config.to_dict() | dict(
            towers=[config.to_dict() for config in each]
        )
        about["hidden_size"] = sum(c.hidden_size for c in each) * self.config.shuffle**2
        return MixtureTowerConfig(**about)

    @property
    def output_axes(self) -> Sequence[str]:
        return [f"towers.{i}.o" for i, _ in enumerate(self._each())]


class AdaptorTower(Tower):
    """A student's heads side by side, in the order of its teachers."""

    config_class = AdaptorTowerConfig

    def __init__(
        self,
        config: AdaptorTowerConfig,
        backbone: nn.Module | None = None,
        heads: dict[str, nn.Module] | None = None,
    ):
        super().__init__(config)
        kinds = {made["teacher"]: made for made in config.heads or ()}
        self.backbone: Any = backbone or _build(config)
        self.heads = nn.ModuleDict(heads or {name: _head(made) for name, made in kinds.items()})
        self.balance = nn.ModuleDict(
            {
                name: _balance(config.balanced, made["theirs"][1], made.get("joined"))
                for name, made in kinds.items()
            }
        )
        _keep_pixels(self, config)
        self.post_init()

    def maps(self, pixels: Tensor) -> list[Tensor]:
        x, heads = (pixels - self.pixel_mean) / self.pixel_std, self._heads()
        if any(head.kind == "ladder" for head in heads):
            class_tokens = gives_class_tokens(self.backbone)
            features, earlier = read_intermediates(self.backbone, x, class_tokens=class_tokens)
        else:
            features, earlier = read_features(self.backbone, x), []
        return [head.predict_map(features, earlier) for head in heads]

    def _heads(self) -> list[Any]:
        return list(self.heads.values())

    @property
    def balances(self) -> Sequence[nn.Module]:
        return list(self.balance.values())

    def networks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {"backbone": (self.config.backbone, dict(self.config.options or {}))}

    def resized(
        self, keywords: Mapping[str, Mapping[str, Any]], widths: Mapping[str, int]
    ) -> AdaptorTowerConfig:
        options = dict(keywords["backbone"])
        made = [self._cut_head(head, widths) for head in self.config.heads or ()]
        if any(head["kind"] == "ladder" for head in made):
            earlier = self._earlier_widths(options)
            if any(len(head["intermediates"]) != len(earlier) for head in made):
                raise ValueError(
                    "A ladder head reads every block of the backbone, so none of them can go; "
                    "leave out layers for vision, or cut widths."
                )
            made = [head | dict(intermediates=earlier) for head in made]
        about: dict[str, Any] = self.config.to_dict() | dict(options=options, heads=made)
        wide = sum(head["joined"] or head["theirs"][1] for head in made)
        about["hidden_size"] = wide * self.config.shuffle**2
        return AdaptorTowerConfig(**about)

    def _earlier_widths(self, options: dict[str, Any]) -> list[list[int]]:
        """Return the widths after each earlier block of a backbone that is not there yet."""
        side = self.config.size
        with torch.device("meta"), torch.no_grad():
            backbone = create_backbone(self.config.backbone, **options).eval()
            class_tokens = gives_class_tokens(backbone)
            black = torch.zeros(1, 3, side, side)
            _, earlier = read_intermediates(backbone, black, class_tokens=class_tokens)
        return [[each.shape[-1] for each in pair if each is not None] for pair in earlier]

    @staticmethod
    def _cut_head(head: dict[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
        """Return what builds a head, with the widths that it was cut to."""
        name, (summary, theirs) = head["teacher"], head["theirs"]
        own = _inside(widths, f"heads.{name}.{_spatial(head)}.")
        of_blocks = _inside(widths, f"heads.{name}.spatial.")
        known = head.get("attn", {}) | {k: v for k, v in of_blocks.items() if k in ATTN_SIZES}
        return head | dict(
            ours=[head["ours"][0], widths.get("width", head["ours"][1])],
            theirs=[summary, own.get("width", theirs)],
            hidden=own.get("hidden", head["hidden"]),
            small=own.get("small"),
            attn=known,
            joined=widths.get(f"balance.{name}.joined"),
        )

    @property
    def output_axes(self) -> Sequence[str]:
        if self.config.balanced:
            return [f"balance.{head['teacher']}.o" for head in self.config.heads or ()]
        return [f"heads.{h['teacher']}.{_spatial(h)}.o" for h in self.config.heads or ()]

    @property
    def same_axes(self) -> Sequence[tuple[str, str]]:
        """Axes that are one: what a head gives is what the affine map behind it takes."""
        heads = (self.config.heads or []) * self.config.balanced
        return [
            (f"heads.{head['teacher']}.{_spatial(head)}.o", f"balance.{head['teacher']}.i")
            for head in heads
        ]


ATTN_SIZES = ("attn_heads", "attn_hidden")
"""Sizes of the blocks in front of an attention head, by their names in `zoo.adaptors.Head`."""


def _spatial(head: Mapping[str, Any]) -> str:
    """Return where in a head its MLP is."""
    return "spatial.mlp" if head["kind"] == "attn" else "spatial"


TOWERS: dict[Any, type[Tower]] = {
    ZooTowerConfig: ZooTower,
    MixtureTowerConfig: MixtureTower,
    AdaptorTowerConfig: AdaptorTower,
}


def _build(config: Any) -> nn.Module:
    return create_backbone(config.backbone, **(config.options or {}))


def _balance(balanced: bool, width: int, joined: int | None) -> nn.Module:
    return UnitVariance(width, joined) if balanced else nn.Identity()


def _inside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what stands under a path, by the rest of it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _head(made: dict[str, Any]) -> TeacherHead:
    kinds = dict(kind=made["kind"], hidden=made["hidden"], num_inner=made["inner"])
    ours, theirs = tuple(made["ours"]), tuple(made["theirs"])
    earlier = [tuple(pair) for pair in made.get("intermediates", ())]
    cut: dict[str, Any] = dict(small=made.get("small"), attn=made.get("attn") or {})
    return TeacherHead(
        ours, theirs, **kinds, upsample=made["upsample"], intermediates=earlier, **cut
    )


def _keep_pixels(tower: Any, config: Any) -> None:
    """Keep mean and deviation of the pixels as tensors that a file holds."""
    mean, std = config.mean or [0.0] * 3, config.std or [1.0] * 3
    tower.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1))
    tower.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1))


def _last_map(backbone: Any, x: Tensor) -> Float[Tensor, "B h w C"]:
    _, maps = backbone.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW")
    return maps[-1].permute(0, 2, 3, 1)
