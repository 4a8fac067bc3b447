"""Teachers out of timm's registry: `timm:NAME[/weights][@resolution]`."""

from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

from zoo.features import Features, read_features
from zoo.teachers.teacher import (
    Frozen,
    TeacherName,
    check_trunk_patches,
    drawn_alike,
    unknown_name,
)


class TimmTeacher(Frozen):
    """A timm model: its pooled vector before the classifier, its last map after the norm."""

    def look(self, x) -> Features:
        return read_features(self.network, x)


def open_timm(name: TeacherName, device: torch.device) -> TimmTeacher:
    """Build a timm model with its own mean, standard deviation and input size."""
    architecture = name.name.partition(".")[0]
    if not timm.is_model(architecture):
        raise unknown_name(name.name, timm.list_models(), "timm model")
    network = _create(name, device)
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"{name.name} cannot be a teacher: timm gives it no forward_intermediates. "
            "Choose a model of another family, or wrap yours with torch:package.function."
        )
    config = resolve_model_data_config(network)
    size = tuple(config["input_size"][1:])
    if name.resolution and (name.resolution,) * 2 != size:
        size = (name.resolution, name.resolution)
        check_trunk_patches(name, network)
        _resize(network, name, size)
    return TimmTeacher(
        f"{name.kind}:{name.name}",
        network,
        size=size,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        license=network.pretrained_cfg.get("license"),
        device=device,
    )


def _create(name: TeacherName, device: torch.device) -> Any:
    if device.type == "meta" or name.weights == "random":
        with drawn_alike(device):
            return timm.create_model(name.name, num_classes=0)
    source: dict[str, Any] = {}
    if name.weights:
        source = dict(pretrained_cfg_overlay=dict(file=name.weights))
    try:
        return timm.create_model(name.name, pretrained=True, num_classes=0, **source)
    except (OSError, RuntimeError) as error:
        what = f"{name.kind}:{name.name}"
        reason = next(iter(str(error).strip().splitlines()), f"no file {name.weights}.")
        raise ValueError(
            f"The weights of {what} could not be loaded: {reason} "
            f"Give a file ({what}/PATH.safetensors), or {what}/random for a trial run."
        ) from error


def _resize(network: Any, name: TeacherName, size: tuple[int, int]) -> None:
    if hasattr(network, "set_input_size"):
        try:
            network.set_input_size(img_size=size)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{name.name} cannot look at {size[0]} px: {error}") from error
    elif network.pretrained_cfg.get("fixed_input_size"):
        own = network.pretrained_cfg["input_size"][1]
        raise ValueError(f"{name.name} takes {own} px and no other size; leave out @{size[0]}.")
