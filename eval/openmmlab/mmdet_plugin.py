"""Register our backbones with mmengine.

A configuration names this module in `custom_imports`. Importing it supplies mmcv's compiled
operations if they are missing, and registers `zoo.Backbone`, `zoo.SimplePyramid` and the hook
`zoo.PlainCheckpoint`. It needs mmengine and mmcv.
"""

from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook  # pyright: ignore[reportMissingImports]
from mmengine.logging import HistoryBuffer  # pyright: ignore[reportMissingImports]
from mmengine.registry import HOOKS, MODELS, Registry  # pyright: ignore[reportMissingImports]

from zoo.eval.detect.backbone import Backbone, SimplePyramid
from zoo.eval.openmmlab.mmcv_ops import supply_ops

supply_ops()  # mmengine's runner imports mmdet's models after this

OUR_MODELS = Registry("model", parent=MODELS, scope="zoo")
OUR_HOOKS = Registry("hook", parent=HOOKS, scope="zoo")

OUR_MODELS.register_module(module=Backbone)
OUR_MODELS.register_module(module=SimplePyramid)


@OUR_HOOKS.register_module()
class PlainCheckpoint(Hook):
    """Write checkpoints of plain data, which `torch.load` reads without executing code.

    mmengine keeps the history of its logs as objects whose pickles call functions, so that
    `torch.load` refuses its checkpoints and a run cannot be resumed. Here the history is written as
    tensors, and converted back to mmengine's objects when it is read.
    """

    priority = "LOWEST"  # after the other hooks, so that what they add is converted too

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(_plain({k: v for k, v in checkpoint.items() if k != "state_dict"}))

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, history in scalars.items():
            if isinstance(history, dict):
                scalars[name] = HistoryBuffer(
                    history["values"].tolist(), history["counts"].tolist(), history["max_length"]
                )


def _plain(x: Any) -> Any:
    """Return a tree in which tensors and numbers replace mmengine's and numpy's objects."""
    if isinstance(x, HistoryBuffer):
        values, counts = (torch.as_tensor(np.asarray(y, dtype=float)) for y in x.data)
        return dict(values=values, counts=counts, max_length=x.max_length)
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    return x.item() if isinstance(x, np.generic) else x
