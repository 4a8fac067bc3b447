"""Start a student from weights of one's own: of a folder of timm, an earlier student, or a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zoo import cut_format, wheels
from zoo.files import near, read_json
from zoo.weights import check_keys

FOLDER = "local-dir:"
"""Before the name of a folder of timm's, such as one of a pruned model."""
HEADS = "heads.json"
"""What an export has beside a timm checkpoint."""


def read_folder(name: str) -> tuple[str, dict[str, Any], Path | None]:
    """Return architecture, options and folder of `local-dir:FOLDER`; another name as it is.

    So is the folder of a model in zoo's own form (`zoo.cut_format`), which no architecture's name
    and options build: `create_backbone` reads it, weights and all.

    Raises:
        ValueError: the folder holds no model that timm can build, nor one in that form.
    """
    if not name.startswith(FOLDER) or cut_folder(name):
        return name, {}, None
    folder = Path(name.removeprefix(FOLDER))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "architecture" not in config:
        raise ValueError(
            f"{folder} holds no model of timm: config.json with an architecture is missing."
        )
    return config["architecture"], undecided(config.get("model_args") or {}), folder


def cut_folder(name: str) -> Path | None:
    """Return the folder of a `local-dir:FOLDER` whose model is in zoo's own form; else None."""
    folder = Path(name.removeprefix(FOLDER))
    return folder if name.startswith(FOLDER) and cut_format.is_cut_format(folder) else None


def create_backbone(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a backbone as `timm.create_model` does, or one in zoo's own form, with its weights."""
    if folder := cut_folder(name):
        return cut_format.load(folder, **kwargs)
    return wheels.create_model(name, pretrained, **kwargs)


def undecided(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm's constructor without those that a run decides itself."""
    decided = ("num_classes", "img_size", "drop_path_rate")
    return {key: value for key, value in arguments.items() if key not in decided}


def find_start(place: Path) -> Path:
    """Return the export or the file of weights that `place` stands for; of a run, its export.

    Raises:
        ValueError: there is none.
    """
    for found in (place, place / "export"):
        if found.is_file() or (found / HEADS).is_file():
            return found
    if (place / "config.json").is_file():
        raise ValueError(
            f"The run in {place} has exported no student yet; finish it with --resume {place}."
        )
    raise ValueError(
        f"A student cannot start from {place}: there is no run, no export and no file of weights."
        f"{near(place)}"
    )


def load_earlier(backbone: nn.Module, name: str, folder: Path, size: int) -> str | None:
    """Copy the weights of a folder of timm into a backbone of the same kind.

    What it says of images, their mean and deviation, goes along.
    Where the images have another side now, tables of positions are brought to it as timm does.

    Args:
        name: Of the backbone, for messages.
        size: Side of the images in pixels that the backbone was built for.

    Returns:
        The licence that the export states; `None` if it states none.

    Raises:
        ValueError: the exported student is another network.
    """
    earlier: Any = create_backbone(f"{FOLDER}{folder}", True, num_classes=0)
    if hasattr(earlier, "set_input_size"):
        earlier.set_input_size(img_size=(size, size))
    state = earlier.state_dict()
    what = earlier.pretrained_cfg.get("architecture")
    hint = f"The student {name} cannot start from {folder}, which holds {what} of another form."
    check_keys(state, backbone.state_dict(), hint=hint)
    backbone.load_state_dict(state)
    ours: Any = backbone.pretrained_cfg
    shown = {key: earlier.pretrained_cfg.get(key) for key in ("mean", "std", "interpolation")}
    ours |= {key: value for key, value in shown.items() if value is not None}
    return earlier.pretrained_cfg.get("license")
