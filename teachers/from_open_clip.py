"""Teachers out of open_clip: `open_clip:MODEL[/WEIGHTS][@RESOLUTION]`, image and text towers.

MODEL is one of `open_clip.list_models()`, or `local-dir:FOLDER`, a folder in open_clip's own form
(`open_clip_config.json`, the weights, the tokenizer's files). WEIGHTS is one of open_clip's tags
for the model, a file, or `random`.

The summary is the image embedding that the text tower's embeddings are compared with: pooled and
projected, not normalised. The map has the patch tokens of the last block after the tower's last
norm, before the projection. (Where an attentional pooler comes before that norm, the tokens are
those of the block itself.)
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.features import Features
from zoo.teachers.hub import how_to_fetch, read_license
from zoo.teachers.name import FOLDER, TeacherName, unknown_name
from zoo.teachers.teacher import (
    Frozen,
    check_patches,
    check_trunk_patches,
    reason,
    seeded_init,
    share_weights,
    size_errors,
)

REFUSED = (OSError, RuntimeError, ValueError, KeyError, ImportError, UnpicklingError)
"""Errors that open_clip raises about names, files and weights."""


class OpenClipTeacher(Frozen):
    """The image tower of a CLIP-like model."""

    def features(self, x) -> Features:
        normed = getattr(self.network, "attn_pool", None) is None
        out = self.network.forward_intermediates(x, indices=1, normalize_intermediates=normed)
        return Features(out["image_features"], out["image_intermediates"][-1].permute(0, 2, 3, 1))

    def network_at(self, size: tuple[int, int]) -> Any:
        network = share_weights(self.network)
        if hasattr(network, "set_input_size"):
            network.set_input_size(size)
        elif not hasattr(network, "grid_size"):
            raise ValueError("its attention pool has a position for each cell")
        else:
            _resize_positions(network, size)
        return network


def open_open_clip(name: TeacherName, device: torch.device) -> OpenClipTeacher:
    """Build a model's image tower with open_clip's own mean, standard deviation and size.

    Raises:
        ValueError: the model or its weights are unknown or not there, or it refuses the resolution.
    """
    import open_clip

    config, tag = _config(name), _tag(name)
    if name.resolution:
        _check_resolution(name, config["vision_cfg"])
    model = _create(name, tag, device)
    if hasattr(model.visual, "trunk"):
        check_trunk_patches(name, model.visual.trunk)
    prepared = open_clip.get_model_preprocess_cfg(model)
    side = prepared["size"]
    size = (side, side) if isinstance(side, int) else (side[0], side[1])
    known = name.weights != "random" and device.type != "meta"
    with size_errors(name, size):
        teacher = OpenClipTeacher(
            name.describe(),
            model.visual,
            size=size,
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
            interpolation=prepared["interpolation"],
            license=_license(name, tag) if known else None,
            device=device,
        )
    teacher.source = name
    return teacher


def _resize_positions(network: Any, size: tuple[int, int]) -> None:
    """Fit an image tower of open_clip's own to a size, as loading its weights would."""
    from open_clip.model import resize_pos_embed

    network.grid_size = tuple(s // p for s, p in zip(size, network.patch_size, strict=True))
    state = {"visual.positional_embedding": network.positional_embedding}
    resize_pos_embed(state, SimpleNamespace(visual=network))
    network.image_size = size
    network.positional_embedding = nn.Parameter(state["visual.positional_embedding"].detach())


class TextTower:
    """Texts in, their embeddings [T D] out: open_clip's tokenizer and text tower.

    Raises:
        ValueError: the model, its weights or its tokenizer are not there.
    """

    def __init__(self, name: TeacherName, device: torch.device):
        import open_clip

        _config(name)
        try:
            self.tokenizer = open_clip.get_tokenizer(name.name)
        except (*REFUSED, TypeError, AssertionError) as error:
            raise ValueError(
                f"The tokenizer of open_clip:{name.name} could not be opened: {reason(error)}. "
                "Its files must be in the hub's cache, or in the folder of an "
                "open_clip:local-dir:FOLDER."
            ) from error
        self.model = _create(name, _tag(name), device)
        del self.model.visual
        self.model.eval().requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device))


def _config(name: TeacherName) -> dict[str, Any]:
    import open_clip

    try:
        config = open_clip.get_model_config(name.name)
    except REFUSED as error:
        raise ValueError(
            f"open_clip:{name.name} could not be opened: {reason(error)}. The folder must hold "
            "open_clip_config.json, open_clip_model.safetensors and the tokenizer's files."
        ) from error
    if config is None:
        raise unknown_name(name.name, open_clip.list_models(), "open_clip model")
    return config


def _tag(name: TeacherName) -> dict[str, Any]:
    """Return what open_clip knows about the weights; nothing for a folder, which has its own.

    For a file it is the preprocessing that all tags of the model share, or nothing (the library's
    default) if they differ.
    """
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    if name.name.startswith(FOLDER):
        return {}
    tags = list_pretrained_tags_by_model(name.name)
    if name.weights and name.weights != "random":
        if tag := get_pretrained_cfg(name.name, name.weights):
            return tag
        if not Path(name.weights).is_file():
            raise ValueError(
                f"open_clip has no weights {name.weights!r} for {name.name}, and there is no such "
                f"file. Its tags are {', '.join(tags) or 'none'}."
            )
    keys = ("mean", "std", "interpolation")
    configs = [{k: get_pretrained_cfg(name.name, tag).get(k) for k in keys} for tag in tags]
    return configs[0] if configs and all(other == configs[0] for other in configs) else {}


def _check_resolution(name: TeacherName, vision: dict[str, Any]) -> None:
    if vision.get("timm_model_name"):
        return  # timm resizes its models itself; `check_trunk_patches` checks the built model
    own = vision.get("image_size", 224)
    if isinstance(vision.get("layers"), list) and name.resolution != own:
        raise ValueError(
            f"open_clip:{name.name} takes {own} px and no other size: its attention pool has a "
            f"position for each cell. Leave out @{name.resolution}."
        )
    if not isinstance(vision.get("layers"), list):
        check_patches(name, vision.get("patch_size", 16))


def _create(name: TeacherName, tag: dict[str, Any], device: torch.device) -> Any:
    import open_clip

    options: dict[str, Any] = dict(force_image_size=name.resolution, force_preprocess_cfg=tag)
    options |= dict(force_quick_gelu=bool(tag.get("quick_gelu")))
    empty = device.type == "meta" or name.weights == "random"
    if not empty:
        _check_weights(name)
    try:
        if empty:
            options |= dict(load_weights=False, pretrained_text=False)
            where = "meta" if device.type == "meta" else "cpu"
            with seeded_init(device), _without_warning():
                return open_clip.create_model(name.name, device=where, **options)
        return open_clip.create_model(
            name.name, pretrained=name.weights, require_pretrained=True, **options
        )
    except REFUSED as error:
        what, hub = f"open_clip:{name.name}", _repository(tag)
        if empty:
            raise ValueError(f"{what} could not be built: {reason(error)}.") from error
        advice = f"Give a file, {what}/PATH"
        if hub:  # a folder rather than a file: it has preprocessing and activation as well
            advice = f"{how_to_fetch(hub)} Then give open_clip:{FOLDER}FOLDER"
        raise ValueError(
            f"The weights of {what} could not be loaded: {reason(error)}. {advice}, or "
            f"{what}/random for a trial run."
        ) from error


def _check_weights(name: TeacherName) -> None:
    """Refuse a name without weights: a model has many, and open_clip has no default."""
    from open_clip import list_pretrained_tags_by_model

    if not name.weights and not name.name.startswith(FOLDER):
        tags = list_pretrained_tags_by_model(name.name)
        known = f"one of {', '.join(tags)}" if tags else "a file; open_clip has none"
        raise ValueError(
            f"open_clip:{name.name} needs weights: {known}. For example "
            f"open_clip:{name.name}/{tags[0] if tags else 'PATH'}, or /random for a trial run."
        )


def _repository(tag: dict[str, Any]) -> str:
    return tag.get("hf_hub", "").rpartition("/")[0]  # it ends in the name of a file, or in a slash


def _license(name: TeacherName, tag: dict[str, Any]) -> str | None:
    if name.name.startswith(FOLDER):
        return read_license(Path(name.name.removeprefix(FOLDER)))
    hub = _repository(tag)
    return read_license(hub) if hub else None


@contextmanager
def _without_warning() -> Iterator[None]:
    """Suppress open_clip's warning, from the root logger, that there are no weights."""

    def keeps(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "initialized randomly" not in message and "no CLIP weights found" not in message

    root = logging.getLogger()
    root.addFilter(keeps)
    try:
        yield
    finally:
        root.removeFilter(keeps)
