"""What a teacher is, and what all teachers that are frozen networks share."""

import copy
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features
from zoo.teachers.name import NECK, TeacherName

_logger = logging.getLogger("zoo")


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
"""Norm layers that take bf16 inputs with float32 weights."""


@runtime_checkable
class Teacher(Protocol):
    """Anything that maps a batch to named targets: a network, a cache, a rule."""

    name: str
    size: tuple[int, int]
    """Rows and columns of the images that it gets, in pixels."""
    summary_dim: int | None
    """Width of its summary; `None` if it has none."""
    spatial_dim: int | None
    """Channels of its spatial map; `None` if it has none."""
    grid: tuple[int, int] | None
    """Rows and columns of its spatial map."""
    license: str | None

    def __call__(self, batch: Batch) -> Features: ...


_draws_there = ContextVar("_draws_there", default=False)


@contextmanager
def draws_on_device() -> Iterator[None]:
    """Within this context, random weights are drawn where the network runs.

    The CPU, which gives everyone the same numbers, takes minutes for billions of them; where only
    shapes matter this is quicker.
    """
    token = _draws_there.set(True)
    try:
        yield
    finally:
        _draws_there.reset(token)


@contextmanager
def seeded_init(device: torch.device) -> Iterator[None]:
    """Within this context, build networks without weights: on `meta` no more than their shapes.

    On other devices they are initialised on the CPU with the same random numbers each time, but
    for `draws_on_device`. The caller's random state stays as it was.
    """
    where = device if device.type == "meta" or _draws_there.get() else torch.device("cpu")
    with (
        torch.random.fork_rng(devices=[where] if where.type == "cuda" else []),
        where,
    ):
        torch.manual_seed(0)
        yield


@contextmanager
def size_errors(name: TeacherName, size: tuple[int, int]) -> Iterator[None]:
    """Turn a library's errors about images of `size` into one that says what to do.

    Raises:
        ValueError: in place of what the library raised.
    """
    try:
        yield
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{name.describe()} cannot look at {size[0]}x{size[1]} px: {reason(error)}."
            + (f" Leave out @{name.resolution}." if name.resolution else "")
        ) from error


def check_patches(name: TeacherName, patch: int) -> None:
    """Refuse a resolution that is no multiple of the patch: the rest would be cut off.

    Args:
        patch: Side of a patch in pixels.

    Raises:
        ValueError: `name.resolution` is none; the nearest multiples are named.
    """
    side = name.resolution or 0
    if side % patch:
        below = side // patch * patch
        near = " or ".join(f"@{s}" for s in (below, below + patch) if s)
        raise ValueError(
            f"{name.describe()} has patches of {patch} px, which do not tile {side} px; "
            f"take {near}."
        )


def check_trunk_patches(name: TeacherName, trunk: nn.Module) -> None:
    """Call `check_patches` with the patch of a timm model, if it has patches.

    Raises:
        ValueError: as `check_patches`.
    """
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if name.resolution and patch:
        check_patches(name, patch if isinstance(patch, int) else patch[0])


def no_neck(name: TeacherName) -> ValueError:
    """Return the error for `+neck` behind the name of a teacher that is no SAM."""
    return ValueError(
        f"{name.describe()} has no neck whose map could be asked for; leave out {NECK}, which is "
        "for SAMs of timm and transformers."
    )


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, without the full stop at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def bf16_weights(network: nn.Module) -> nn.Module:
    """Convert the weights of `network` to bf16, except those of its norm layers; in place.

    It must then run under `torch.autocast`: matrix products find bf16 weights and cast nothing,
    norms keep float32. Buffers stay as they are, because rotary frequencies and running statistics
    lose too much in bf16.
    """
    for module in network.modules():
        if isinstance(module, NORMS):
            continue
        if "Norm" in type(module).__name__:
            # autocast does not know other norms, and torch.rms_norm is slow on mixed types
            if _in_float32 not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_in_float32)
            continue
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point():
                weight.data = weight.data.to(torch.bfloat16)
    return network


def _in_float32(module: nn.Module, args: tuple) -> tuple:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in args)


def share_weights(network: nn.Module) -> Any:
    """Copy the modules of a network but none of its tensors."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def device_interpolation(name: str) -> str:
    """Return the interpolation for `Batch.at`, given the library's name of it.

    Others than bicubic and bilinear become bicubic, with a warning.
    """
    if name in ("bicubic", "bilinear"):
        return name
    _logger.warning("Images are resized with bicubic interpolation instead of %s.", name or "none")
    return "bicubic"


class Frozen(nn.Module):
    """A network that is never trained, with its own image size and normalisation.

    A subclass defines `features`: how the network's outputs become `Features`. The widths and the
    grid are read off the features of one black image, so no adapter keeps a table of them.

    Args:
        size: Rows and columns of its images, in pixels.
        mean: Of each colour, with values in [0, 1]; subtracted from the images.
        std: Of each colour; what the images are divided by.
        interpolation: How images are resized: bicubic or bilinear.
    """

    network: Any
    mean: Tensor
    std: Tensor
    source: TeacherName | None = None
    """The name that it was opened by, if its text tower can be opened as well."""

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str = "bicubic",
        license: str | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.name, self.size, self.license = name, size, license
        self.interpolation, self.in_bf16 = device_interpolation(interpolation), False
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.network = network
        self.requires_grad_(False).eval().to(device)
        self._measure()

    def _measure(self) -> None:
        """Find the widths and the grid."""
        with torch.no_grad():
            summary, spatial = self(Batch(torch.zeros(1, 3, *self.size, device=self.mean.device)))
        self.summary_dim = None if summary is None else summary.shape[-1]
        self.spatial_dim = None if spatial is None else spatial.shape[-1]
        self.grid = None if spatial is None else (spatial.shape[1], spatial.shape[2])

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode: a teacher is never trained."""
        return super().train(False)

    def features(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        """Return the features of normalised images at `size`."""
        raise NotImplementedError(f"{type(self).__name__} does not define features()")

    def at_size(self, size: tuple[int, int]) -> "Frozen":
        """Return this teacher for images of another size, with the same weights in memory.

        What the library makes for a size (tables of positions) is new, made from this one's.

        Raises:
            ValueError: the network cannot take images of that size; or an error of its library.
        """
        other = copy.copy(self)  # and modules, buffers, hooks in dicts of its own
        vars(other).update((k, copy.copy(v)) for k, v in vars(self).items() if isinstance(v, dict))
        other.network = self.network_at(size).requires_grad_(False).eval()
        other.size = size
        other._measure()
        return other

    def network_at(self, size: tuple[int, int]) -> nn.Module:
        """Return the network for images of another size; itself, if it takes all sizes."""
        return self.network

    def to_bf16(self) -> "Frozen":
        """Convert the weights to bf16, except those of norms (see `bf16_weights`), in place."""
        bf16_weights(self.network)
        self.in_bf16 = True
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> Features:
        x = (batch.at(self.size, self.interpolation) - self.mean) / self.std
        if not self.in_bf16:
            return self.features(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.features(x)


def fingerprint(teacher: Teacher) -> str:
    """Hash a teacher's weights, size and widths, so that a resumed run can check it is the same."""
    about = f"{teacher.size} {teacher.summary_dim} {teacher.spatial_dim}"
    return fingerprint_of(teacher if isinstance(teacher, nn.Module) else None, about)


def fingerprint_of(network: nn.Module | None, about: str = "") -> str:
    """Hash a network's weights, and what else is to be the same."""
    digest = hashlib.sha256(about.encode())
    for key, value in sorted(network.state_dict().items()) if network else ():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
