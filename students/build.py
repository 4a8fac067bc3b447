"""Build a student by name: a timm backbone, and a head for each teacher."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import GluMlp
from torch import nn

from zoo.features import (
    gives_class_tokens,
    read_features,
    read_intermediates,
    summary_tokens,
)
from zoo.layers import spectral
from zoo.students.heads import HeadKind, TeacherHead, head_hidden
from zoo.students.start import create_backbone, load_earlier, read_folder
from zoo.students.student import Student
from zoo.wheels import without_tag


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
    start: Path | None = None,
    drop_path_rate: float = 0.0,
    options: Mapping[str, Any] | None = None,
    dynamic: bool = False,
    spectral_norms: bool = False,
    tokens: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
) -> Student:
    """Build a registered backbone with heads for `teachers`.

    Args:
        name: A name that `timm.create_model` knows; of `local-dir:FOLDER`, also in zoo's own form,
            the weights too.
        teachers: Summary and spatial width of each teacher by label; `None` for no such target.
        size: Side of the images in pixels.
        kind: Kind of the heads, see `zoo.students.heads`.
        hidden: Width of the heads' hidden layers; the widest teacher's by default.
        inner: Further hidden layers of the kinds that are MLPs.
        upsample: Cells of the spatial heads' grid along each side of one of the backbone's.
        start: The export or file of weights that the backbone starts from: `zoo.students.start`.
        options: Further keywords for `timm.create_model`, which an export keeps.
        dynamic: Build the backbone for images of several sizes, if it can (`dynamic_img_size`).
        spectral_norms: Reparametrise the blocks of a ViT for training (`zoo.layers.spectral`).
        tokens: The prefix token of each teacher's summary, see `assign_tokens`, whose choice is
            the default; {} lets all heads read the backbone's own summary.

    Raises:
        ValueError: the backbone is unknown, refuses an option or the weights, cannot take the size
            or the kind of heads, has too few summary tokens for the teachers, or has no attention
            blocks to reparametrise.
    """
    training: dict[str, Any] = dict(drop_path_rate=drop_path_rate) if drop_path_rate else {}
    how: dict[str, Any] = dict(pretrained=pretrained, start=start, dynamic=dynamic)
    with torch.device(device):
        backbone, recipe, license = _start_backbone(name, size, training, options or {}, **how)
        if spectral_norms:
            _reparametrise(recipe[0], backbone)
        hidden = hidden or head_hidden(teachers)
        # this function's keywords: an export has them
        head: dict[str, Any] = dict(kind=kind, hidden=hidden, inner=inner, upsample=upsample)
        return Student(
            backbone,
            build_heads(backbone, teachers, size=size, **head),
            size=(size, size),
            **_normalisation(backbone),
            recipe=recipe,
            head=head,
            tokens=assign_tokens(backbone, teachers) if tokens is None else tokens,
            license=license,
        )


def _normalisation(backbone: nn.Module) -> dict[str, tuple[float, ...]]:
    """Return the mean and the deviation of the images that a backbone takes."""
    config = resolve_model_data_config(backbone)
    return {name: tuple(config[name]) for name in ("mean", "std")}


def _start_backbone(
    name: str,
    size: int,
    training: dict[str, Any],
    options: Mapping[str, Any],
    *,
    pretrained: bool,
    start: Path | None,
    dynamic: bool,
) -> tuple[nn.Module, tuple[str, dict[str, Any]], str | None]:
    """Build the backbone with the weights it starts from; return it with its recipe and licence."""
    name, own, folder = read_folder(name)
    if folder and torch.get_default_device().type != "meta":
        pretrained, start = False, start or folder
    file = start is not None and start.is_file()
    if file:
        training = training | dict(pretrained_cfg_overlay=dict(file=str(start)))
    backbone, kwargs = _build_backbone(
        name, size, pretrained or file, training, own | dict(options), dynamic=dynamic
    )
    license = backbone.pretrained_cfg.get("license") if pretrained or file else None
    if start and not file:
        license = load_earlier(backbone, name, start, size)
    return backbone, (without_tag(name), kwargs), license


def assign_tokens(
    backbone: nn.Module,
    teachers: Mapping[str, tuple[int | None, int | None]],
    taken: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Give each teacher a summary token of its own, if the backbone has several (RADIO).

    In AM-RADIO (2312.06709) each teacher's summary head reads a token of its own. Here the teachers
    that have a summary get the backbone's summary tokens in their order.

    Args:
        teachers: As for `build_student`.
        taken: Tokens that teachers of an earlier student have, and keep.

    Raises:
        ValueError: there are more such teachers than tokens.
    """
    slots = summary_tokens(backbone)
    if len(slots) < 2:
        return {}
    found = {label: token for label, token in (taken or {}).items() if label in teachers}
    free = [token for token in slots if token not in found.values()]
    wanted = [label for label, (width, _) in teachers.items() if width and label not in found]
    if len(wanted) > len(free):
        total = len(slots) + len(wanted) - len(free)
        raise ValueError(
            f"The student has {len(slots)} summary tokens and {len(wanted) - len(free)} more "
            "teachers have a summary; give it one for each: --student-options "
            f"'summary_idxs={tuple(range(total))}'."
        )
    return found | dict(zip(wanted, free, strict=False))


def build_heads(
    backbone: nn.Module,
    teachers: Mapping[str, tuple[int | None, int | None]],
    *,
    size: int,
    kind: HeadKind,
    hidden: int,
    inner: int,
    upsample: int,
) -> dict[str, TeacherHead]:
    """Build a head for each of `teachers` on a backbone; see `build_student`."""
    ours, intermediates = _widths(backbone, size, uses_intermediates=kind == "ladder")
    shared: dict[str, Any] = dict(kind=kind, hidden=hidden, num_inner=inner, upsample=upsample)
    shared["intermediates"] = intermediates
    return {label: TeacherHead(ours, width, **shared) for label, width in teachers.items()}


@torch.no_grad()
def _widths(
    backbone: Any, size: int, *, uses_intermediates: bool
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Find the widths of summary and map, at the end and after each block, on a black image."""
    backbone.eval()
    black = torch.zeros(1, 3, size, size)
    with _looking(type(backbone).__name__, size, size):
        features, earlier = read_features(backbone, black), []
    if uses_intermediates:
        class_tokens = gives_class_tokens(backbone)
        features, earlier = read_intermediates(backbone, black, class_tokens=class_tokens)
    backbone.train()
    widths = []
    for summary, spatial in (features, *earlier):
        assert summary is not None and spatial is not None
        widths.append((summary.shape[-1], spatial.shape[-1]))
    return widths[0], widths[1:]


def _build_backbone(
    name: str,
    size: int,
    pretrained: bool,
    training: dict[str, Any],
    options: dict[str, Any],
    *,
    dynamic: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Return the backbone, and the keywords with which `timm.create_model` builds it again."""
    kwargs: dict[str, Any] = dict(num_classes=0) | options
    backbone = _create(name, pretrained, kwargs | training)
    if dynamic and getattr(backbone, "dynamic_img_size", True) is False:
        kwargs["dynamic_img_size"] = True
        backbone = _create(name, pretrained, kwargs | training)
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{name} cannot be a student: it has no forward_intermediates in timm.")
    own = resolve_model_data_config(backbone)["input_size"][-1]
    if size != own:
        if hasattr(backbone, "set_input_size"):
            try:
                backbone.set_input_size(img_size=(size, size))
            except Exception as error:  # whatever the family stumbles over
                raise ValueError(f"{name} cannot look at {size} px: {error}") from error
            kwargs["img_size"] = size
        elif backbone.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{name} takes {own} px and no other size; use --size {own}.")
    return backbone, kwargs


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    try:
        return create_backbone(name, pretrained, **kwargs)
    except (ValueError, OSError):
        raise
    except Exception as error:  # a class may raise anything about an option's value
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if set(kwargs) <= {"num_classes", "drop_path_rate"}:
            raise ValueError(f"{name} could not be built: {lines[0]}") from error
        raise ValueError(
            f"{name} refuses its options ({lines[0]}). Correct --student-options; the signature of "
            "the model's class has the options that it takes."
        ) from error


def _reparametrise(name: str, backbone: Any) -> None:
    """Give each matrix of a ViT's blocks a spectral norm of its own; in place."""
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
    """Read `key=value` texts; a value is a Python literal, or else a string.

    Raises:
        ValueError: a text is not of that form, or a key is neither a name nor names joined by dots.
    """
    pairs = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.replace(".", "_").isidentifier():
            raise ValueError(f"The option {text!r} is not of the form key=value.")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pairs[key] = value
    return pairs


@contextmanager
def _looking(name: str, size: int, side: int) -> Iterator[None]:
    """Turn what a backbone raises about images of `side` pixels into one sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        built = f"{name}, built for {size} px," if side != size else name
        raise ValueError(
            f"The student {built} cannot look at {side} px: {reason}. Choose another size."
        ) from error


@lru_cache(maxsize=32)
def student_grids(
    name: str, size: int, sizes: tuple[int, ...], options: tuple[str, ...] = ()
) -> dict[int, tuple[int, int]]:
    """Find the grid of a backbone built at `size` for images of each of `sizes`, without weights.

    Args:
        size: Side of the images in pixels, as are `sizes`.
        options: `key=value` texts, see `read_options`.

    Returns:
        Rows and columns of the map, for each of `sizes`.

    Raises:
        ValueError: the backbone cannot take images of one of the sizes.
    """
    name, own, _ = read_folder(name)
    with torch.device("meta"):
        backbone, _ = _build_backbone(
            name, size, False, {}, own | read_options(options), dynamic=len(sizes) > 1
        )
        backbone.eval()
        grids = {}
        for side in sizes:
            with torch.no_grad(), _looking(name, size, side):
                spatial = read_features(backbone, torch.zeros(1, 3, side, side)).spatial
            assert spatial is not None
            grids[side] = (spatial.shape[1], spatial.shape[2])
    return grids
