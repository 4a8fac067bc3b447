"""What a teacher is, how one is named, and the part that every frozen network shares."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features
from zoo.teachers.name import TeacherName

_logger = logging.getLogger("zoo")


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
"""Norm layers that take bf16 inputs beside float32 weights."""


@runtime_checkable
class Teacher(Protocol):
    """Anything that maps a batch to named targets: a network, a cache, a rule."""

    name: str
    size: tuple[int, int]
    """Rows and columns of the images that it looks at."""
    summary_dim: int | None
    spatial_dim: int | None
    grid: tuple[int, int] | None
    """Rows and columns of its spatial map."""
    license: str | None

    def __call__(self, batch: Batch) -> Features: ...


def check_losses(name: str, teacher: Teacher, *, summary: float, spatial: float) -> None:
    """Hold the weights of a teacher's losses against what it gives.

    A summary weight beside a teacher without a summary leaves that loss out, as AM-RADIO
    (2312.06709, section 3.4) does for SAM; a map that is asked for must be there.

    Raises:
        ValueError: the teacher has no map and `spatial` is above 0, or nothing is asked of it.
    """
    if spatial and teacher.spatial_dim is None:
        raise ValueError(
            f"The teacher {name} has no spatial output, and its spatial loss has the weight "
            f"{spatial:g}. Write {name},spatial=0 to learn its summary alone."
        )
    if not spatial and not (summary and teacher.summary_dim):
        raise ValueError(
            f"The teacher {name} has no summary, and its spatial loss is off; "
            "nothing can be learnt from it."
        )


@contextmanager
def drawn_alike(device: torch.device) -> Iterator[None]:
    """Build networks without weights: on `meta` their shapes, elsewhere the same draws each time.

    The caller's random state stays as it was.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if device.type == "meta" else "cpu"),
    ):
        torch.manual_seed(0)
        yield


@contextmanager
def looking(name: TeacherName, size: tuple[int, int]) -> Iterator[None]:
    """Say which teacher could not look at images of `size`, and what to do.

    Raises:
        ValueError: in place of what the library raised.
    """
    try:
        yield
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{name.kind}:{name.name} cannot look at {size[0]}x{size[1]} px: {reason(error)}."
            + (f" Leave out @{name.resolution}." if name.resolution else "")
        ) from error


def check_patches(name: TeacherName, patch: int) -> None:
    """Refuse a resolution that the patches do not tile: the rest of the image would be cut off.

    Raises:
        ValueError: `name` asks for one; its neighbours that fit are named.
    """
    side = name.resolution or 0
    if side % patch:
        below = side // patch * patch
        near = " or ".join(f"@{s}" for s in (below, below + patch) if s)
        raise ValueError(
            f"{name.kind}:{name.name} has patches of {patch} px, which do not tile {side} px; "
            f"take {near}."
        )


def check_trunk_patches(name: TeacherName, trunk: nn.Module) -> None:
    """Do as `check_patches` with the patches of a timm model, if it has any."""
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if name.resolution and patch:
        check_patches(name, patch if isinstance(patch, int) else patch[0])


def reason(error: BaseException) -> str:
    """Return the first line of an error, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def bf16_weights(network: nn.Module) -> nn.Module:
    """Keep the weights of `network` in bf16, all but those of its norm layers; in place.

    It must then run under `torch.autocast`, which brings inputs and weights together: matrix
    products find bf16 weights and cast nothing, norms keep float32. Buffers stay as they are,
    because rotary frequencies and running statistics lose too much in bf16.
    """
    for module in network.modules():
        if isinstance(module, NORMS):
            continue
        if "Norm" in type(module).__name__:
            # autocast knows nothing of the others, and torch.rms_norm is slow on mixed types
            module.register_forward_pre_hook(_in_float32)
            continue
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point():
                weight.data = weight.data.to(torch.bfloat16)
    return network


def _in_float32(module: nn.Module, args: tuple) -> tuple:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in args)


def device_interpolation(name: str) -> str:
    """Return the interpolation that images are resized with, for a library's name of it."""
    if name in ("bicubic", "bilinear"):
        return name
    _logger.warning("Images are resized with bicubic interpolation instead of %s.", name or "none")
    return "bicubic"


class Frozen(nn.Module):
    """A network that is never trained, with its own size and normalisation.

    Subclasses say in `look` how the network's outputs become `Features`. The shapes are found
    by looking at one black image, so no adapter keeps a table of widths.
    """

    network: Any
    mean: Tensor
    std: Tensor
    source: TeacherName | None = None
    """What it was opened by, if its text tower can be opened as well."""

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
        with torch.no_grad():
            seen = self(Batch(torch.zeros(1, 3, *size, device=device)))
        self.summary_dim = None if seen.summary is None else seen.summary.shape[-1]
        self.spatial_dim = None if seen.spatial is None else seen.spatial.shape[-1]
        self.grid = None if seen.spatial is None else tuple(seen.spatial.shape[1:3])

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode: a teacher has no other."""
        return super().train(False)

    def features(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        """Turn normalised images into features."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it looks at images")

    def to_bf16(self) -> "Frozen":
        """Go over to bf16 weights with float32 norms (see `half_weights`), for good."""
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
    """Hash a teacher's weights and size, so that a resumed run can tell that it is the same."""
    digest = hashlib.sha256(f"{teacher.size} {teacher.summary_dim} {teacher.spatial_dim}".encode())
    if isinstance(teacher, nn.Module):
        for key, value in sorted(teacher.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
