"""What a teacher is, how one is named, and the part that every frozen network shares."""

import difflib
import hashlib
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features

KINDS = {
    "timm": ("zoo.teachers.from_timm", "open_timm"),
    "zoo": ("zoo.teachers.from_zoo", "open_zoo"),
    "torch": ("zoo.teachers.from_torch", "open_torch"),
    "pretext": ("zoo.teachers.pretext", "open_pretext"),
}


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


@dataclass(frozen=True)
class TeacherName:
    """A teacher's name taken apart: `kind:name[/weights][@resolution]`.

    `weights` is a file, or `random`; without it the library's own weights are loaded.
    `resolution` is the side in pixels; without it the network's own.
    """

    kind: str
    name: str
    weights: str | None = None
    resolution: int | None = None

    @classmethod
    def parse(cls, text: str) -> "TeacherName":
        """Read a name.

        Raises:
            ValueError: the text has no kind, an unknown kind, or an empty name.
        """
        kind, colon, rest = text.partition(":")
        if not colon or not rest:
            raise ValueError(
                f"{text!r} does not name a teacher. The form is kind:name[/weights][@resolution] "
                f"with a kind out of {', '.join(KINDS)}, for example timm:vit_base_patch16_224."
            )
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            hint = f" Did you mean {near[0]}:{rest}?" if near else ""
            raise ValueError(
                f"Teachers of the kind {kind!r} are unknown; there are {', '.join(KINDS)}.{hint}"
            )
        at = re.fullmatch(r"(.+)@(\d+)", rest)
        resolution = None
        if at:
            rest, resolution = at[1], int(at[2])
        name, _, weights = rest.partition("/")
        return cls(kind, name, weights or None, resolution)

    @property
    def label(self) -> str:
        """The name in a form that metrics, files and modules can carry."""
        name = self.name.rpartition(".")[2] if self.kind == "torch" else self.name
        return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def open_teacher(text: str, *, device: torch.device | str = "cpu") -> Teacher:
    """Build the teacher that `text` names, frozen and in eval mode, on `device`.

    On the device `meta` nothing is downloaded or allocated; only its shapes are known.

    Raises:
        ValueError: as `TeacherName.parse`; an unknown name (the nearest is suggested), weights
            that are not there, a resolution that the network cannot take.
    """
    name = TeacherName.parse(text)
    module, opener = KINDS[name.kind]
    return getattr(import_module(module), opener)(name, torch.device(device))


def unknown_name(name: str, known: list[str], what: str) -> ValueError:
    """Make the error for a name that is not in `known`, with the nearest that is."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"There is no {what} {name!r}.{hint}")


class Frozen(nn.Module):
    """A network that is never trained, with its own size and normalisation.

    Subclasses say in `look` how the network's outputs become `Features`. The shapes are found
    by looking at one black image, so no adapter keeps a table of widths.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        license: str | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.name, self.size, self.license = name, size, license
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

    def look(self, x: Float[Tensor, "B 3 H W"]) -> Features:
        """Turn normalised images into features."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it looks at images")

    @torch.no_grad()
    def forward(self, batch: Batch) -> Features:
        return self.look((batch.at(self.size) - self.mean) / self.std)


def fingerprint(teacher: Teacher) -> str:
    """Hash a teacher's weights and size, so that a resumed run can tell that it is the same."""
    digest = hashlib.sha256(f"{teacher.size} {teacher.summary_dim} {teacher.spatial_dim}".encode())
    if isinstance(teacher, nn.Module):
        for key, value in sorted(teacher.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
