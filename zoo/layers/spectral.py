"""Weights with a learned spectral norm: the direction is one parameter, the size another.

    W_eff = W · s / (uᵀ W v + ε),    uᵀ W v ≈ the largest singular value of W

σReparam (2303.06296) with two changes that RADIO made: s = softplus(raw) + 0.05 cannot vanish or
change its sign, and `raw` is a 1x1 matrix, so that weight decay reaches it. It keeps attention
from collapsing at high resolution, and is folded away for release.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

EPS = 1e-6
FLOOR = 0.05
"""The smallest scale of version 2."""

START_STEPS = 30
"""Steps of power iteration at construction."""


def spectral_weight(
    weight: Float[Tensor, "rows cols"],
    u: Float[Tensor, " rows"],
    v: Float[Tensor, " cols"],
    raw: Float[Tensor, "1 1"],
    version: int = 2,
) -> Float[Tensor, "rows cols"]:
    """Return the effective weight.

    Args:
        version: 1 for s = raw (the first checkpoints), 2 for s = softplus(raw) + 0.05.
    """
    scale = raw if version == 1 else F.softplus(raw) + FLOOR
    sigma = torch.dot(u, torch.mv(weight, v))
    return weight * (scale / (sigma + EPS))


class SpectralScale(nn.Module):
    """A parametrisation (torch.nn.utils.parametrize) that learns a matrix's spectral norm.

    In training mode each forward takes one step of power iteration; W_eff starts at W.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Float[Tensor, "rows cols"], version: int = 2):
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"Spectral reparametrisation has versions 1 and 2, not {version}.")
        self.version = version
        if version == 2:  # the published mark; version 1 was saved without one
            self.register_buffer("_sn_version", torch.tensor(2, device=weight.device))
        like: dict[str, Any] = dict(device=weight.device, dtype=weight.dtype)
        self.register_buffer("u", torch.empty(weight.shape[0], **like))
        self.register_buffer("v", torch.empty(weight.shape[1], **like))
        with torch.no_grad():
            self.u.copy_(F.normalize(torch.randn_like(self.u), dim=0))
            self.follow(weight, 0 if weight.is_meta else START_STEPS)
            sigma = torch.dot(self.u, torch.mv(weight, self.v)) + EPS
            if version == 2:
                # The inverse of softplus; a matrix below the floor starts as small as it can.
                sigma = torch.log(torch.expm1((sigma - FLOOR).clamp(min=EPS)))
        self.raw = nn.Parameter(sigma.reshape(1, 1))

    @torch.no_grad()
    def follow(self, weight: Float[Tensor, "rows cols"], steps: int = 1) -> None:
        """Take steps of power iteration: u and v come nearer to the first singular vectors."""
        for _ in range(steps):
            self.v.copy_(F.normalize(torch.mv(weight.T, self.u), dim=0))
            self.u.copy_(F.normalize(torch.mv(weight, self.v), dim=0))

    def forward(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        with _without_autocast(weight):  # which makes mv, but not dot, a bf16 operation on CUDA
            if self.training:
                self.follow(weight)
            # Clones: the next step may change the buffers before this one's backward pass.
            return spectral_weight(weight, self.u.clone(), self.v.clone(), self.raw, self.version)


def _without_autocast(like: Tensor) -> AbstractContextManager:
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


class SpectralParts(nn.Module):
    """Spectral scales for equal parts of a matrix, stacked along its rows (q, k and v).

    Parts after the last scale are left as they are: with two of three, v keeps its weight.
    """

    def __init__(self, weight: Tensor, parts: int, *, scaled: int | None = None, version: int = 2):
        super().__init__()
        self.total = parts
        chunks = weight.chunk(parts)[: parts if scaled is None else scaled]
        self.parts = nn.ModuleList(SpectralScale(chunk, version) for chunk in chunks)

    def follow(self, weight: Float[Tensor, "rows cols"], steps: int = 1) -> None:
        """Take steps of power iteration in each part."""
        for part, chunk in zip(self.parts, weight.chunk(self.total), strict=False):
            cast(SpectralScale, part).follow(chunk, steps)

    def forward(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        chunks = list(weight.chunk(self.total))
        for i, part in enumerate(self.parts):
            chunks[i] = part(chunks[i])
        return torch.cat(chunks)


def reparametrise(
    model: nn.Module, *, version: int = 2, scale_values: bool = True, glu: Iterable[str] = ()
) -> nn.Module:
    """Give each linear layer of `model` a spectral norm of its own to learn, in place.

    Hand over the blocks and not the patch embedding, which keeps its weight.

    Args:
        scale_values: Also scale the value third of a `qkv` layer.
        glu: Names (within `model`) of layers that stack a gate and its value.
    """
    glu = set(glu)
    for name, part in list(model.named_modules()):
        if not isinstance(part, nn.Linear) or parametrize.is_parametrized(part):
            continue
        weight = part.weight.detach()
        if name.rpartition(".")[2] == "qkv":
            scale: nn.Module = SpectralParts(
                weight, 3, scaled=3 if scale_values else 2, version=version
            )
        elif name in glu:
            scale = SpectralParts(weight, 2, version=version)
        else:
            scale = SpectralScale(weight, version)
        parametrize.register_parametrization(part, "weight", scale.eval())
        scale.train(part.training)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Replace every spectral parametrisation by its effective weight, in place.

    The outputs in eval mode stay the same.
    """
    for part, _ in list(_reparametrised(model)):
        cast(nn.ModuleDict, part.parametrizations).eval()
        parametrize.remove_parametrizations(part, "weight")
    return model


def follow(model: nn.Module, steps: int = 1) -> None:
    """Take steps of power iteration on every weight as it is now, in place.

    For weights that something else than training changed, such as an average.
    """
    for part, scale in _reparametrised(model):
        weights = cast(nn.ModuleDict, part.parametrizations)["weight"]
        weight: Any = cast(Tensor, weights.original).detach()
        scale.follow(weight.full_tensor() if hasattr(weight, "full_tensor") else weight, steps)


def has_unit_vectors(model: nn.Module) -> bool:
    """Tell whether all singular vectors have length 1; waits for the device."""
    scales = [scale for scale in model.modules() if isinstance(scale, SpectralScale)]
    return all(abs(scale.u.norm().item() - 1) < 1e-3 for scale in scales)


def _reparametrised(model: nn.Module) -> Iterator[tuple[nn.Module, SpectralScale | SpectralParts]]:
    """Yield the layers with a spectral norm, each with its scale."""
    for part in model.modules():
        if parametrize.is_parametrized(part, "weight"):
            scale = cast(nn.ModuleList, cast(nn.ModuleDict, part.parametrizations)["weight"])[0]
            if isinstance(scale, SpectralScale | SpectralParts):
                yield part, scale


_MARK = ".parametrizations.weight."
_LEAVES = {"u": "u", "_u": "u", "v": "v", "_v": "v", "raw": "raw", "scale": "raw"}


def _scales(group: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The (u, v, raw) of each part, in the order of their rows."""
    parts: dict[tuple, dict[str, Tensor]] = {}
    for key, value in group.items():
        *path, leaf = key.split(".")
        if leaf in _LEAVES:
            place = tuple(int(step) if step.isdigit() else -1 for step in path)
            parts.setdefault(place, {})[_LEAVES[leaf]] = value
    return [parts[place] for place in sorted(parts)]


def baked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the effective weights in place of the parametrised ones.

    A part has as many rows as its `u` has entries; rows of no part stay. A key `_sn_version` marks
    version 2. A state dict without parametrisations comes back as it is.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        module, mark, rest = key.partition(_MARK)
        if mark:
            groups.setdefault(module, {})[rest] = value
        else:
            plain[key] = value
    for module, group in groups.items():
        original = group["original"]
        weight = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
        version = 2 if any(key.endswith("_sn_version") for key in group) else 1
        row = 0
        for part in _scales(group):
            rows = slice(row, row + len(part["u"]))
            u, v, raw = (part[name].to(weight) for name in ("u", "v", "raw"))
            weight[rows] = spectral_weight(weight[rows], u, v, raw.reshape(1, 1), version)
            row = rows.stop
        plain[f"{module}.weight"] = weight.to(original.dtype)
    return plain
