"""Turn an official checkpoint into a folder that timm builds by itself.

convert("c-radio_v3-b_half.pth.tar", "radio_vit_base_patch16.c_radio_v3", "c_radio_v3_b")
timm.create_model("local-dir:c_radio_v3_b", pretrained=True)
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import nn

from zoo.checkpoint import SHOWN, save_whole, written_whole

_SOURCE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture")
"""What a `pretrained_cfg` says about where weights came from: no longer true of a conversion."""


def convert(source: str | Path, name: str, out_dir: str | Path, **kwargs: Any) -> Path:
    """Read a checkpoint as the model `name`, strictly, and write it for timm.

    `out_dir` gets `model.safetensors` and `config.json` (architecture, pretrained_cfg,
    model_args); each is written whole or not at all, the configuration last.

    Args:
        source: A file in any layout that the family reads.
        name: Registered name; a tag says which release the file is.
        kwargs: Further arguments of the model, kept in the configuration.

    Returns:
        `out_dir`.

    Raises:
        ValueError: the name is unknown, or the file is damaged, could run code, or does not fit;
            at most ten missing and ten extra keys are listed.
    """
    if not timm.is_model(name):
        raise ValueError(f"There is no model {name!r}; `zoo.list_models()` names ours.")
    if not Path(source).is_file():
        raise ValueError(f"There is no weight file {source}.")
    model = _loaded(source, name, kwargs)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Clones: safetensors takes neither views nor two names for one memory.
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    save_whole(state, out_dir / "model.safetensors", partial(save_file, metadata={"format": "pt"}))
    with written_whole(out_dir / "config.json") as path:
        path.write_text(json.dumps(_config(model, name, kwargs), indent=2) + "\n")
    return out_dir


def _loaded(source: str | Path, name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=dict(file=str(source)), **kwargs
        )
    except RuntimeError as error:
        raise ValueError(_reason(str(error), source, name)) from None


def _reason(message: str, source: str | Path, name: str) -> str:
    """Shorten what torch says about keys: it names them all."""
    kinds = {"missing": r"Missing key\(s\).*", "extra": r"Unexpected key\(s\).*"}
    lists = {
        kind: re.findall(r'"([^"]+)"', "".join(re.findall(line, message)))
        for kind, line in kinds.items()
    }
    lists["of another shape"] = re.findall(r"size mismatch for ([^:\s]+)", message)
    if not any(lists.values()):
        return f"{source} was refused: {message.splitlines()[0]}"
    counts = "; ".join(_listed(kind, keys) for kind, keys in lists.items() if keys)
    return (
        f"{source} does not fit {name}: {counts}. Is it another size or release? "
        "`zoo.list_models()` names ours."
    )


def _listed(kind: str, keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:SHOWN])}{more}"


def _config(model: nn.Module, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    architecture = name.partition(".")[0]
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k not in _SOURCE and v is not None}
    cfg.update(custom_load=False, num_classes=model.num_classes)
    return dict(
        architecture=architecture,
        num_classes=model.num_classes,
        num_features=model.num_features,
        pretrained_cfg=cfg,
        # A family whose file decides part of the architecture leaves that in `build_args`.
        model_args=kwargs | getattr(model, "build_args", {}),
    )
