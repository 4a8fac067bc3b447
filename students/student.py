"""A student: any timm backbone, and one pair of heads for each teacher."""

import ast
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import GluMlp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zoo.features import Batch, Features, gives_class_tokens, read_features, read_ladder
from zoo.layers import spectral
from zoo.students.heads import HeadKind, TeacherHead, head_hidden

MESA = "mesa.ema"
"""Where a student's answer holds its own map, for its average to teach; no label has a dot."""


class Student(nn.Module):
    """Batch -> {teacher: Features}.

    Args:
        heads: One head a teacher, by the teacher's label.
        size: Rows and columns of the images that the backbone gets.
        recipe: Name and keywords with which `timm.create_model` builds the backbone again.
        head: Keywords with which `TeacherHead` builds the heads again.
        license: Licence of the weights that it started from; `None` if it started from none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        recipe: tuple[str, dict[str, Any]],
        head: dict[str, Any],
        license: str | None = None,
    ):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        self.size, self.recipe, self.head, self.license = size, recipe, head, license
        self.climbs = head.get("kind") == "ladder"
        self.class_tokens = self.climbs and gives_class_tokens(backbone)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def look(self, batch: Batch, size: tuple[int, int] | None = None) -> Features:
        """Give the backbone's own features."""
        return self._see(batch.at(size or self.size))

    def own_map(self, batch: Batch, size: tuple[int, int] | None = None) -> Features:
        """Give the backbone's own map for MESA, each cell normalised to mean 0 and variance 1."""
        return _normalised(self.look(batch, size))

    def _see(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        return read_features(self.backbone, (images - self.mean) / self.std)

    def answer(
        self, images: Float[Tensor, "B 3 H W"], *, mesa: bool = False
    ) -> dict[str, Features]:
        """Answer for every teacher; the part that is worth compiling.

        Args:
            mesa: Give the own map as well, under `MESA`.
        """
        below: list[Features] = []
        if self.climbs:
            x = (images - self.mean) / self.std
            seen, below = read_ladder(self.backbone, x, class_tokens=self.class_tokens)
        else:
            seen = self._see(images)
        answers = {name: head(seen, below) for name, head in self.heads.items()}
        return answers | {MESA: _normalised(seen)} if mesa else answers

    def forward(
        self, batch: Batch, *, size: tuple[int, int] | None = None, mesa: bool = False
    ) -> dict[str, Features]:
        images = batch.at(size or self.size)
        return self.answer(images, mesa=True) if mesa else self.answer(images)

    def with_folded_heads(self, fold: Mapping[str, Callable[..., nn.Linear]]) -> "Student":
        """Give a student whose spatial heads end in the teachers' own spaces.

        The backbone is shared with this one; the heads are copies, so this one trains on.

        Args:
            fold: For each teacher, what to make of the last linear layer of its spatial head and
                the keyword `blocks` (see `TeacherHead.fold`).
        """
        folded = copy.copy(self)
        folded._modules = dict(self._modules)
        folded.heads = copy.deepcopy(self.heads)
        for name, change in fold.items():
            folded.heads[name].fold(change)
        return folded

    def without_spectral(self) -> "Student":
        """Give a student with plain weights, as it is released; the heads are shared.

        The backbone is built anew: torch keeps a parametrisation in a class that copies share, so
        what is removed from a copy is gone from the original (and from the average) as well.
        """
        if not any(parametrize.is_parametrized(part) for part in self.backbone.modules()):
            return self
        plain = copy.copy(self)
        plain._modules = dict(self._modules)
        name, kwargs = self.recipe
        with torch.device(self.mean.device):
            plain.backbone = timm.create_model(name, **kwargs)
        plain.backbone.load_state_dict(spectral.baked(self.backbone.state_dict()))
        plain.backbone.train(self.backbone.training)
        return plain


def _normalised(seen: Features) -> Features:
    """Put the map through a layer norm without scale and shift (C-RADIOv4, 2.3)."""
    assert seen.spatial is not None  # every backbone of `read_features` has a map
    spatial = seen.spatial.float()
    return Features(None, F.layer_norm(spatial, spatial.shape[-1:]))


def build_student(
    name: str,
    teachers: Mapping[str, tuple[int | None, int | None]],
    *,
    size: int,
    kind: HeadKind = "v2",
    hidden: int | None = None,
    inner: int = 1,
    upsample: int = 1,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    options: Mapping[str, Any] | None = None,
    dynamic: bool = False,
    spectral_norms: bool = False,
    device: torch.device | str = "cpu",
) -> Student:
    """Build a registered backbone at `size` with heads for `teachers`.

    Args:
        name: Anything that `timm.create_model` knows.
        teachers: Summary and spatial width of each teacher by label; `None` for no such target.
        kind: What the heads are, see `zoo.students.heads`.
        hidden: Width of the heads' hidden layers; the widest teacher's by default.
        inner: Further hidden layers of the kinds that are MLPs.
        upsample: Cells of the spatial heads' grid along each side of one of the backbone's.
        options: Further keywords for `timm.create_model`, which an export keeps.
        dynamic: Build the backbone for several sizes of images, if it asks to be told.
        spectral_norms: Reparametrise the blocks of a ViT for training (`zoo.layers.spectral`).

    Raises:
        ValueError: the backbone is unknown, refuses an option, cannot take the size or the kind
            of heads, or has no attention blocks to reparametrise.
    """
    training = dict(drop_path_rate=drop_path_rate) if drop_path_rate else {}
    with torch.device(device):
        backbone, kwargs = _build_backbone(
            name, size, pretrained, training, dict(options or {}), dynamic=dynamic
        )
        if spectral_norms:
            _reparametrise(name, backbone)
        config = timm.data.resolve_model_data_config(backbone)
        ours, rungs = _widths(backbone, size, climbs=kind == "ladder")
        head = dict(kind=kind, hidden=hidden or head_hidden(teachers), inner=inner)
        head |= dict(upsample=upsample)
        heads = {
            label: TeacherHead(ours, theirs, **head, rungs=rungs)
            for label, theirs in teachers.items()
        }
        return Student(
            backbone,
            heads,
            size=(size, size),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            recipe=(name, kwargs),
            head=head,
            license=backbone.pretrained_cfg.get("license") if pretrained else None,
        )


@torch.no_grad()
def _widths(
    backbone: Any, size: int, *, climbs: bool
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Look at a black image: the widths of summary and map, at the end and after each block."""
    backbone.eval()
    black = torch.zeros(1, 3, size, size)
    seen, below = read_features(backbone, black), []
    if climbs:
        seen, below = read_ladder(backbone, black, class_tokens=gives_class_tokens(backbone))
    backbone.train()
    ours, *rungs = [(x.summary.shape[-1], x.spatial.shape[-1]) for x in (seen, *below)]
    return ours, rungs


def _build_backbone(
    name: str,
    size: int,
    pretrained: bool,
    training: dict[str, Any],
    options: dict[str, Any],
    *,
    dynamic: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone, and the keywords that a user needs to build it again."""
    kwargs: dict[str, Any] = dict(num_classes=0) | options
    backbone = _create(name, pretrained, kwargs | training)
    if dynamic and getattr(backbone, "dynamic_img_size", True) is False:
        kwargs["dynamic_img_size"] = True
        backbone = _create(name, pretrained, kwargs | training)
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{name} cannot be a student: timm gives it no forward_intermediates.")
    own = timm.data.resolve_model_data_config(backbone)["input_size"][-1]
    if size != own:
        if hasattr(backbone, "set_input_size"):
            try:
                backbone.set_input_size(img_size=(size, size))
            except (AssertionError, ValueError) as error:
                raise ValueError(f"{name} cannot look at {size} px: {error}") from error
            kwargs["img_size"] = size
        elif backbone.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{name} takes {own} px and no other size; use --size {own}.")
    return backbone, kwargs


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        if set(kwargs) <= {"num_classes", "drop_path_rate"}:
            raise
        raise ValueError(
            f"{name} refuses its options ({error}); see --student-options, and the signature of "
            "the model's class for what it takes."
        ) from error


def _reparametrise(name: str, backbone: Any) -> None:
    """Give the matrices of a ViT's blocks their own spectral norms."""
    if hasattr(backbone, "set_spectral"):
        backbone.set_spectral()
        return
    blocks: nn.Module = getattr(backbone, "blocks", nn.Sequential())
    names = dict(blocks.named_modules())
    if not any(part.rpartition(".")[2] == "qkv" for part in names):
        raise ValueError(
            f"{name} has no attention blocks of a ViT, whose matrices spectral norms are for; "
            "leave out --spectral, or choose a ViT."
        )
    glu = [f"{part}.fc1" for part, module in names.items() if isinstance(module, GluMlp)]
    spectral.reparametrise(blocks, glu=glu)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read keywords for `timm.create_model`: `crop_positions=False`, `vitdet={"window": 8}`.

    Raises:
        ValueError: as `read_pairs`, or a text sets what the run decides itself.
    """
    options = read_pairs(texts)
    for key in options:
        if key in ("pretrained", "num_classes", "img_size", "drop_path_rate"):
            raise ValueError(
                f"The student's option {key} is decided by the run; there are --pretrained, "
                "--size and --optim.drop-path."
            )
    return options


def read_pairs(texts: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` texts; values are Python's literals, and what is none is a string.

    Raises:
        ValueError: a text has not that form; keys are names, or names joined by dots.
    """
    pairs = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.replace(".", "_").isidentifier():
            raise ValueError(f"The option {text!r} has not the form key=value.")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs


@lru_cache(maxsize=32)
def student_grids(
    name: str, size: int, sizes: tuple[int, ...], options: tuple[str, ...] = ()
) -> dict[int, tuple[int, int]]:
    """Find the grid of a backbone that is built at `size`, at each of `sizes`; costs no memory.

    Raises:
        ValueError: it cannot take one of them.
    """
    with torch.device("meta"):
        backbone, _ = _build_backbone(
            name, size, False, {}, read_options(options), dynamic=len(sizes) > 1
        )
        backbone.eval()
        grids = {}
        for side in sizes:
            try:
                with torch.no_grad():
                    spatial = read_features(backbone, torch.zeros(1, 3, side, side)).spatial
            except (ValueError, RuntimeError, AssertionError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise ValueError(
                    f"The student {name}, built for {size} px, cannot look at {side} px: {reason}. "
                    "Choose other --sizes."
                ) from error
            assert spatial is not None
            grids[side] = (spatial.shape[1], spatial.shape[2])
    return grids
