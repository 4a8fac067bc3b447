"""What lmms-eval finds by its entry point `lmms_eval.models`: the model `zoo_vlm`."""

from typing import Any


def manifest() -> Any:
    """Return the model's entry in lmms-eval's registry; lmms-eval calls this."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest("zoo_vlm", simple_class_path="zoo.eval.multimodal.lmms_model.ZooVlm")
