"""What every model here takes, a `Batch`, and what it returns, `Features`.

The legend of shapes, one meaning for each letter in the whole project:

    B batch    H W grid    N vision tokens    T text tokens    C channels    D a second width
    E experts  G groups    S SSM state        n rows of a feature matrix
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


class Features(NamedTuple):
    """What a backbone, a teacher or a student's head returns for a batch."""

    summary: Float[Tensor, "B D"] | None
    """One vector an image; `None` for a teacher that has none (SAM, a segmenter)."""
    spatial: Float[Tensor, "B H W C"] | None
    """One vector a grid cell, channels last; `None` for a teacher that has none."""


@dataclass(frozen=True)
class Batch:
    """Images that were decoded once; every model takes them at its own size.

    `images` are bytes 0..255 or floats in [0, 1]. They are not normalised here: mean and standard
    deviation belong to each model.
    """

    images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]
    keys: Sequence[str] = ()
    """Names of the samples, for caches and error messages."""
    labels: Tensor | None = None
    positions: Sequence[int] = ()
    """Positions in the stream of training views, by which caches find them."""
    number: int = 0
    """Of the batch among those of an evaluation, by which the shares of several ranks are put in
    order again."""
    _resized: dict[tuple[tuple[int, int], str], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    def at(self, size: tuple[int, int], interpolation: str = "bicubic") -> Float[Tensor, "B 3 h w"]:
        """Return the images in [0, 1] at `size` (rows, columns); each distinct size is made once.

        Args:
            interpolation: `bicubic` or `bilinear`, with antialiasing.
        """
        fits = tuple(self.images.shape[-2:]) == size
        key = (size, "" if fits else interpolation)
        if key not in self._resized:
            if fits:
                images = self.images if self.images.is_floating_point() else self.images / 255
            else:
                images = resize(self.images, size, interpolation)
            self._resized[key] = images
        return self._resized[key]

    def to(self, device, *, non_blocking: bool = True) -> "Batch":
        """Move the images (and labels) to `device`."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=non_blocking)
        images = self.images.to(device, non_blocking=non_blocking)
        return Batch(images, self.keys, labels, self.positions, self.number)


def resize(
    x: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"], size: tuple[int, int], mode: str
) -> Float[Tensor, "B 3 h w"]:
    """Resize images to `size` (rows, columns) and to [0, 1], antialiased.

    Args:
        x: Bytes 0..255, or floats in [0, 1].
        mode: `bicubic` or `bilinear`.
    """
    if x.device.type == "cuda":
        return by_products(x, size, mode).clamp_(0, 1)
    x = x if x.is_floating_point() else x / 255
    return F.interpolate(x, size, mode=mode, antialias=True).clamp(0, 1)


def by_products(
    x: UInt8[Tensor, "B C H W"] | Float[Tensor, "B C H W"], size: tuple[int, int], mode: str
) -> Float[Tensor, "B C h w"]:
    """Resize images with antialiasing as two matrix products, as a GPU does it fastest.

    Bytes are exact in 16 bits, and with weights in 16 bits the result is off by 0.05 of a byte's
    step (root mean square; half a step at most), where bytes themselves are off by 0.29. Floats
    are multiplied in their own precision, or in TF32 where that is on.
    """
    whole = x.is_floating_point()
    like = torch.empty((), dtype=x.dtype if whole else torch.float32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        rows, cols = (
            _averages(old, new, like, mode) for old, new in zip(x.shape[2:], size, strict=True)
        )
        if whole:
            return rows @ (x @ cols.T)
        return ((rows / 255).half() @ (x.half() @ cols.half().T)).float()


def read_features(
    model: Any, x: Float[Tensor, "B 3 H W"], *, norm: bool = True, tokens: Sequence[int] = ()
) -> Features:
    """Read any timm model's features: its pooled vector and its last map.

    Args:
        norm: Put the map through the final norm (of a SAM: through its neck).
        tokens: Prefix tokens of a model that pools by its first: the summary is [B n D], one
            vector for each of them.
    """
    final, maps = model.forward_intermediates(x, indices=1, norm=norm, output_fmt="NCHW")
    return Features(_summary(model, final, tokens), maps[-1].permute(0, 2, 3, 1))


def _summary(model: Any, final: Tensor, tokens: Sequence[int]) -> Tensor:
    if not tokens:
        return model.forward_head(final, pre_logits=True)
    pooled = [model.forward_head(final[:, token:], pre_logits=True) for token in tokens]
    return torch.stack(pooled, dim=1)


def summary_tokens(model: Any) -> list[int]:
    """List the prefix tokens that are summaries, of a model that has several (RADIO); else []."""
    found = getattr(model, "summary_idxs", None)
    if found is None or not gives_class_tokens(model):
        return []
    return list(range(len(found))) if found.is_meta else found.tolist()


def is_plain_transformer(model: Any) -> bool:
    """Tell whether all blocks of a model share one width and one grid, behind prefix tokens."""
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def gives_class_tokens(model: Any) -> bool:
    """Tell whether a model pools by its class token, and returns it beside its maps."""
    pools = getattr(model, "global_pool", None) == "token"
    return pools and is_plain_transformer(model) and bool(model.num_prefix_tokens)


def read_intermediates(
    model: Any, x: Float[Tensor, "B 3 H W"], *, class_tokens: bool, tokens: Sequence[int] = ()
) -> tuple[Features, list[Features]]:
    """Read a model's features, and those after each earlier block (or stage).

    The earlier ones come as the block returns them, without the final norm, which is the last
    block's (UNIC, 2408.05088). The summary of an intermediate is its class token, else the mean of
    its map. All maps are resized to the grid of the last one, so that those of a pyramid can be
    added.

    Args:
        class_tokens: What `gives_class_tokens` returns for the model.
        tokens: As for `read_features`.

    Returns:
        The features after the last block, as `read_features` reads them, and the intermediates.
    """
    plain = is_plain_transformer(model)  # a pyramid norms its last stage alone
    options = dict(return_prefix_tokens=True) if class_tokens else {}
    final, taps = model.forward_intermediates(x, norm=not plain, output_fmt="NCHW", **options)
    maps = [(tap[0] if class_tokens else tap).permute(0, 2, 3, 1) for tap in taps]
    grid = (maps[-1].shape[1], maps[-1].shape[2])
    last = final[:, model.num_prefix_tokens :].unflatten(1, grid) if plain else maps[-1]
    intermediates = []
    for tap, spatial in zip(taps[:-1], maps[:-1], strict=True):
        prefix = list(tokens) or 0
        summary = tap[1][:, prefix] if class_tokens else spatial.mean(dim=(1, 2))
        intermediates.append(Features(summary, at_grid(spatial, grid)))
    return Features(_summary(model, final, tokens), last), intermediates


def match_grid(
    ours: Float[Tensor, "B H W C"], theirs: Float[Tensor, "B h w C"]
) -> tuple[Float[Tensor, "B y x C"], Float[Tensor, "B y x C"]]:
    """Resize two maps to one grid: the smaller number of rows, and of columns, of the two.

    AM-RADIO enlarges the coarser map instead, which asks the student for details that the teacher
    does not have. Shrinking is bilinear with antialiasing, so no cell is skipped and the mean of a
    map stays; pixel centres match (`align_corners=False`). A map that has the grid already
    comes back as it is, any other in float32 at least.
    """
    grid = (min(ours.shape[1], theirs.shape[1]), min(ours.shape[2], theirs.shape[2]))
    return at_grid(ours, grid), at_grid(theirs, grid)


def at_grid(x: Float[Tensor, "B H W C"], grid: tuple[int, int]) -> Float[Tensor, "B y x C"]:
    """Resize a map to `grid` (rows, columns), bilinear with antialiasing: two matrix products.

    The backward pass of `F.interpolate` with antialiasing adds atomically on CUDA: two runs
    differ, and `torch.use_deterministic_algorithms` refuses it. It only makes the weights here.
    """
    if tuple(x.shape[1:3]) == grid:
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
    with torch.autocast(device, enabled=False):
        rows, cols = (
            _averages(old, new, x, "bilinear") for old, new in zip(x.shape[1:3], grid, strict=True)
        )
        return torch.einsum("yH,BHWC,xW->ByxC", rows, x, cols)


def _averages(old: int, new: int, like: Tensor, mode: str) -> Float[Tensor, "new old"]:
    """Return the weights with which `old` cells are averaged to `new` ones along one side."""
    identity = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(identity, (new, old), mode=mode, antialias=True)[0, 0]
