"""Start a student from weights of one's own: those of an earlier student, or of a file."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from zoo.weights import check_keys

HEADS = "heads.json"
"""What an export has beside a timm checkpoint."""


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
    )


def load_earlier(backbone: nn.Module, name: str, folder: Path, size: int) -> str | None:
    """Copy the weights of an exported student into a backbone of the same kind.

    Where the images have another side now, tables of positions are brought to it as timm does.

    Args:
        name: Of the backbone, for messages.
        size: Side of the images in pixels that the backbone was built for.

    Returns:
        The licence that the export states; `None` if it states none.

    Raises:
        ValueError: the exported student is another network.
    """
    earlier: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    if hasattr(earlier, "set_input_size"):
        earlier.set_input_size(img_size=(size, size))
    state = earlier.state_dict()
    what = earlier.pretrained_cfg.get("architecture")
    hint = f"The student {name} cannot start from {folder}, which holds {what} of another form."
    check_keys(state, backbone.state_dict(), hint=hint)
    backbone.load_state_dict(state)
    return earlier.pretrained_cfg.get("license")
