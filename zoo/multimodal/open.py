"""Open vision towers by name, and put them in front of a language model."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from zoo.language.bars import bars_for_large
from zoo.multimodal.budget import tokens_of
from zoo.multimodal.projector import check_width, projector_width
from zoo.multimodal.towers import (
    AdaptorTower,
    AdaptorTowerConfig,
    MixtureTower,
    MixtureTowerConfig,
    Tower,
    ZooTower,
    ZooTowerConfig,
)
from zoo.students.build import build_student
from zoo.students.export import load_export
from zoo.students.start import cut_folder, find_start
from zoo.students.student import Student

ADAPTORS, VLM = "adaptors:", "vlm:"


def open_tower(
    name: str,
    *,
    size: int | None = None,
    stride: int | None = None,
    shuffle: int = 1,
    max_tokens: int = 1024,
    native: bool = False,
    balanced: bool = True,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Tower:
    """Open one tower.

    Args:
        name: A name that timm knows, with a tag for its weights, or `local-dir:FOLDER` for those of
            an export or a cut model; `adaptors:RUN` for a student of `zoo distill` with its heads;
            `vlm:FOLDER` for the tower of a trained Llava, which stays as it is. `@SIZE` behind it
            is the side of its images in pixels.
        size: Side of the images where the name says nothing; the network's own by default.
        stride: Pixels of a cell of an adaptor tower's grid; the backbone's own by default.
        shuffle: Cells along each side of a token.
        max_tokens: Most tokens of an image.
        native: Keep the images' shapes.
        balanced: Leave place for the affine map that brings its features to variance 1.
        options: Further keywords of `timm.create_model` for a network by its name.

    Raises:
        ValueError: there is no such network, or it refuses the size or an option.
    """
    plain, at, side = name.rpartition("@")
    if at and side.isdecimal():
        name, size = plain, int(side)
    if name.startswith(VLM):
        return tower_of(open_vlm(name))
    shared: dict[str, Any] = dict(
        shuffle=shuffle, max_tokens=max_tokens, native=native, balanced=balanced
    )
    if name.startswith(ADAPTORS):
        folder = find_start(Path(name.removeprefix(ADAPTORS)))
        return adaptor_tower(load_export(folder), size=size, stride=stride, **shared)
    if cut_folder(name):
        raise ValueError(
            f"{name} is in zoo's own form, whose sizes no configuration of transformers holds; "
            "take a cut that its library can build (zoo prune without --form zoo)."
        )
    return backbone_tower(_student(name, size, native, options, device), **shared)


def _student(
    name: str,
    size: int | None,
    native: bool,
    options: Mapping[str, Any] | None,
    device: torch.device | str,
) -> Student:
    import timm

    from zoo.students.start import FOLDER
    from zoo.wheels import without_tag

    is_folder = name.startswith(FOLDER)
    if not is_folder and not timm.is_model(name.partition(".")[0]):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"There is no network {name!r} for a tower; give a name of timm, local-dir:FOLDER, "
            f"adaptors:RUN or vlm:FOLDER.{hint}"
        )
    if size is None:
        config = None if is_folder else timm.get_pretrained_cfg(without_tag(name))
        size = config.input_size[-1] if config else _folder_size(name)
    shared: dict[str, Any] = dict(pretrained=not is_folder and "." in name, dynamic=native)
    try:
        return build_student(name, {}, size=size, options=options, device=device, **shared)
    except ValueError as error:  # here they are called otherwise
        said = str(error).replace("--student-options", "--tower-options")
        raise ValueError(said) from error


def _folder_size(name: str) -> int:
    from zoo.files import read_json
    from zoo.students.start import FOLDER

    config = read_json(Path(name.removeprefix(FOLDER)) / "config.json")
    return (config.get("pretrained_cfg", {}).get("input_size") or [3, 224, 224])[-1]


def backbone_tower(
    student: Student, *, shuffle: int, max_tokens: int, native: bool, balanced: bool
) -> ZooTower:
    """Make a tower of a student's backbone; its heads stay behind."""
    side = student.size[0]
    grid = _grid(student, native)
    name, options = student.recipe
    config = ZooTowerConfig(
        backbone=name, options=options, mean=_values(student.mean), std=_values(student.std),
        width=grid.width, balanced=balanced, license=student.license,
        **_shared(side, grid.stride, shuffle, grid.width, max_tokens, native, grid.multiple),
    )  # fmt: skip
    tower: Any = ZooTower(config, student.backbone)
    return tower.to(student.mean.device).eval()


def adaptor_tower(
    student: Student,
    *,
    size: int | None = None,
    stride: int | None = None,
    shuffle: int = 1,
    max_tokens: int = 1024,
    native: bool = False,
    balanced: bool = True,
) -> AdaptorTower:
    """Make a tower of a student's heads, in the order of its teachers.

    Raises:
        ValueError: it has no head with a map, or heads of summary tokens of their own.
    """
    every: dict[str, Any] = dict(student.heads.items())
    heads = {name: _of_map(head) for name, head in every.items() if head.widths[1] is not None}
    if not heads:
        raise ValueError("This student has no head that predicts a map, which a tower is made of.")
    side = size or student.size[0]
    grid = _grid(student, native)
    ours, earlier = _widths(student)
    made: list[dict[str, Any]] = [
        head.made
        | dict(teacher=name, ours=list(ours), theirs=[None, head.widths[1]], intermediates=earlier)
        for name, head in heads.items()
    ]
    name, options = student.recipe
    joined = sum(each["theirs"][1] for each in made)
    cell = stride or grid.stride
    config = AdaptorTowerConfig(
        backbone=name, options=options, mean=_values(student.mean), std=_values(student.std),
        heads=made, balanced=balanced, license=student.license,
        **_shared(side, cell, shuffle, joined, max_tokens, native, grid.multiple),
    )  # fmt: skip
    tower: Any = AdaptorTower(config, student.backbone, heads)
    return tower.to(student.mean.device).eval()


def _of_map(head: Any) -> Any:
    """Return a head without what predicts summaries, which no tower reads; its weights stay."""
    alone = copy.copy(head)
    alone._modules = dict(head._modules) | dict(summary=None)
    return alone


def mixture_tower(
    towers: Sequence[Tower],
    *,
    size: int,
    stride: int,
    shuffle: int = 1,
    max_tokens: int = 1024,
    native: bool = False,
) -> MixtureTower:
    """Join towers; each sees an image of side `size` at its own side.

    Args:
        stride: Pixels of a cell of the common grid, in an image of side `size`.

    Raises:
        ValueError: there are fewer than two, or one is no `ZooTower`.
    """
    if len(towers) < 2 or not all(isinstance(tower, ZooTower) for tower in towers):
        raise ValueError(
            "A mixture is of two backbones or more, each a tower of its own; "
            f"these are {', '.join(type(tower).__name__ for tower in towers) or 'none'}."
        )
    each: list[Any] = list(towers)
    if native and not all(tower.config.native for tower in each):
        raise ValueError("A mixture keeps the shapes of images only if each of its towers does.")
    width = sum(tower.config.width for tower in each)
    config = MixtureTowerConfig(
        towers=[tower.config.to_dict() for tower in each],
        **_shared(size, stride, shuffle, width, max_tokens, native),
    )
    return MixtureTower(config, each).eval()


def _shared(
    size: int, stride: int, shuffle: int, width: int, max_tokens: int, native: bool,
    multiple: int = 1,
) -> dict[str, Any]:  # fmt: skip
    cell = stride * shuffle
    if size % cell:
        raise ValueError(
            f"Images of {size} px do not fall into tokens of {cell} px ({stride} px a cell, "
            f"{shuffle} cells a token along each side); {size // cell * cell or cell} px do."
        )
    if not native and tokens_of(size, size, cell) > max_tokens:
        raise ValueError(
            f"Images of {size} x {size} px make {tokens_of(size, size, cell)} tokens, beyond the "
            f"budget of {max_tokens}; give a smaller size, a larger shuffle or more tokens."
        )
    return dict(
        size=size, image_size=size, stride=stride, patch_size=cell, shuffle=shuffle,
        hidden_size=width * shuffle**2, max_tokens=max_tokens, native=native,
        multiple=math.lcm(cell, multiple),
    )  # fmt: skip


def _values(x: torch.Tensor) -> list[float]:
    return x.flatten().tolist()


class _Grid(NamedTuple):
    """What a backbone makes of a square image."""

    stride: int
    width: int
    multiple: int
    """Pixels that sides are multiples of."""


@torch.no_grad()
def _grid(student: Student, native: bool) -> _Grid:
    """Look at black images: one square, and where shapes are kept, wider ones until one passes.

    Raises:
        ValueError: no image that is not square passes.
    """
    side = student.size[0]
    device, student = student.mean.device, student.eval()
    spatial = student.forward_features(torch.zeros(1, 3, side, side, device=device)).spatial
    assert spatial is not None
    stride, width, reason = side // spatial.shape[1], spatial.shape[-1], ""
    if not native:
        return _Grid(stride, width, stride)
    for cells in (1, 2, 4):
        wide = torch.zeros(1, 3, side, side + cells * stride, device=device)
        try:
            found = student.forward_features(wide).spatial
        except Exception as error:  # whatever the family stumbles over
            reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if found is not None and tuple(found.shape[1:3]) == (
            side // stride,
            side // stride + cells,
        ):
            return _Grid(stride, width, cells * stride)
    raise ValueError(
        f"{student.recipe[0]}, built for {side} px, keeps no image's shape"
        f"{': ' + reason.rstrip('.') if reason else ''}. Leave out native, so that every image is "
        "brought to a square."
    )


@torch.no_grad()
def _widths(student: Student) -> tuple[tuple[int, int], list[list[int]]]:
    """Return the widths of the backbone's summary and map, and after each earlier block."""
    from zoo.features import read_features, read_intermediates

    black = torch.zeros(1, 3, *student.size, device=student.mean.device)
    heads: list[Any] = list(student.heads.values())
    if any(head.kind == "ladder" for head in heads):
        features, earlier = read_intermediates(
            student.backbone, black, class_tokens=student.class_tokens
        )
    else:
        features, earlier = read_features(student.backbone, black), []

    def pair(features: Any) -> list[int]:
        return [features.summary.shape[-1], features.spatial.shape[-1]]

    own = pair(features)
    return (own[0], own[1]), [pair(f) for f in earlier]


# ---------------------------------------------------------------- behind a tower


def build_llava(tower: Tower, language: Any, *, image_token: int) -> Any:
    """Put a tower in front of a causal language model: transformers' Llava as it is.

    The projector is new; both models are used as they are, not copied. The language model gets
    rows up to the image token where its vocabulary ends before.

    Args:
        language: Of transformers, with an output embedding.
        image_token: The id that stands in the text wherever a token of an image does.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    rows = language.get_input_embeddings().weight.shape[0]
    if rows <= image_token:
        language.resize_token_embeddings(image_token + 1, mean_resizing=False)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=_square_tokens(tower),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.lm_head = language.get_output_embeddings()
    model.generation_config = language.generation_config
    return model.eval()


def replace_tower(model: Any, tower: Tower) -> None:
    """Put another tower in front of a Llava's projector, in place.

    Raises:
        ValueError: the projector takes another width.
    """
    check_width(tower.config.hidden_size, projector_width(model))
    model.model.vision_tower = tower
    model.config.vision_config = tower.config
    model.config.image_seq_length = _square_tokens(tower)


def _square_tokens(tower: Tower) -> int:
    config = tower.config
    return tokens_of(config.size, config.size, config.patch_size)


def tower_of(model: Any) -> Tower:
    """Return the vision tower of a Llava.

    Raises:
        ValueError: it is none of zoo's.
    """
    tower = model.model.vision_tower
    if not isinstance(tower, Tower):
        raise ValueError(
            f"The vision tower is a {type(tower).__name__}, and only zoo's own (ZooTower, "
            "MixtureTower, AdaptorTower) say how many tokens an image makes."
        )
    return tower


def pixels_of(model: Any) -> Any:
    """Return what says how many tokens an image makes: the configuration of a Llava's tower.

    Raises:
        ValueError: the tower is none of zoo's.
    """
    return tower_of(model).config


def save_backbone(tower: Tower, folder: Path) -> None:
    """Write the backbone of a tower as a folder of timm, so that it can teach or start another.

    `timm:local-dir:FOLDER` is then a teacher of `zoo distill`.

    Raises:
        ValueError: it is a mixture, which has several, or the folder is not empty.
    """
    from timm.models._hub import save_for_hf

    from zoo.files import folder_written_whole

    backbone, config = getattr(tower, "backbone", None), tower.config
    if backbone is None:
        raise ValueError("A mixture has several backbones; save those of its `towers`.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"The folder {folder} is not empty; give another.")
    about = dict(
        input_size=[3, config.size, config.size], mean=config.mean, std=config.std, num_classes=0,
        fixed_input_size=False, crop_pct=1.0, license=config.license,
    )  # fmt: skip
    options = {k: v for k, v in (config.options or {}).items() if k != "num_classes"}
    with folder_written_whole(folder) as making:
        save_for_hf(
            backbone, str(making), model_config=dict(pretrained_cfg=about), model_args=options,
            safe_serialization=True,
        )  # fmt: skip


def vlm_folder(name: str) -> Path:
    """Return the folder of transformers that `vlm:FOLDER` stands for; of a run, its export.

    Raises:
        ValueError: there is none, or it holds no Llava.
    """
    from zoo.files import near, read_json

    folder = Path(name.removeprefix(VLM))
    if (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"There is no model of images and text in {folder}: config.json is missing. zoo "
            f"distill --image-text writes one to RUN/export.{near(folder)}"
        )
    about = read_json(folder / "config.json")
    if about.get("kind") == "distill_image_text":
        raise ValueError(
            f"The run in {folder} has no export yet: finish it with zoo distill --resume {folder}."
        )
    found = about.get("model_type")
    if found != "llava":
        raise ValueError(f"{folder} holds a model of the kind {found}, and no llava.")
    return folder


def open_vlm(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Open a Llava whose tower is one of zoo's: `vlm:FOLDER`, or a run of `zoo distill`.

    Raises:
        ValueError: there is none, its weights are damaged, or its tower is another.
    """
    from transformers import LlavaForConditionalGeneration

    import zoo.multimodal  # noqa: F401  registers the towers

    folder = vlm_folder(name)
    try:
        with bars_for_large(folder):
            model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} cannot be opened: {reason}") from error
    tower_of(model)
    return model.to(device).eval()


def parts_of(model: Any) -> dict[str, nn.Module]:
    """Return the three parts of a Llava that learn at rates of their own."""
    inner = model.model
    return dict(
        tower=inner.vision_tower,
        projector=inner.multi_modal_projector,
        language=inner.language_model,
    )
