"""Turn an official checkpoint into a folder that timm builds by itself.

convert("c-radio_v3-b_half.pth.tar", "radio_vit_base_patch16.c_radio_v3", "c_radio_v3_b")
timm.create_model("local-dir:c_radio_v3_b", pretrained=True)
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn

import zoo
from zoo.files import save_whole, written_whole

_SOURCE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture")
"""Fields of a `pretrained_cfg` that say where weights came from; a conversion drops them."""


def convert(source: str | Path, name: str, out_dir: str | Path, **kwargs: Any) -> Path:
    """Read a checkpoint strictly into the model `name`, and write it for timm.

    `out_dir` gets `model.safetensors` and `config.json` (architecture, pretrained_cfg,
    model_args); each is written whole or not at all, the configuration last.

    Args:
        source: A file in any layout that the family reads.
        name: One of `zoo.list_models()`; a tag names the release that the file is.
        kwargs: Further arguments of the model, kept in the configuration.

    Returns:
        `out_dir`.

    Raises:
        ValueError: the name is unknown, or the file is damaged, could run code, or does not fit;
            at most ten missing and ten extra keys are listed.
    """
    if name.partition(".")[0] not in zoo.list_models():
        raise ValueError(f"zoo has no model {name!r}; `zoo list` shows its models.")
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
    overlay = dict(file=str(source))
    try:
        return zoo.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except (ValueError, RuntimeError) as error:  # the second is timm's, for tags and pickles
        raise ValueError(f"{source} does not fit {name}: {error}") from None


def _config(model: nn.Module, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    architecture = name.partition(".")[0]
    cfg = cast(dict[str, Any], model.pretrained_cfg)
    cfg = {k: v for k, v in cfg.items() if k not in _SOURCE and v is not None}
    cfg.update(custom_load=False, num_classes=model.num_classes)
    return dict(
        architecture=architecture,
        num_classes=model.num_classes,
        num_features=model.num_features,
        pretrained_cfg=cfg,
        # A family whose file decides part of the architecture leaves that in `build_args`.
        model_args=kwargs | getattr(model, "build_args", {}),
    )
