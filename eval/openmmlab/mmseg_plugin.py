"""Register our backbones and masks with mmseg.

A configuration names this module in `custom_imports`. Importing it does what
`zoo.eval.openmmlab.mmdet_plugin` does, and registers the data set `zoo.SegmentFolder` and the
pipeline step `zoo.LoadClasses`. It needs mmseg.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmengine.registry import (  # pyright: ignore[reportMissingImports]
    DATASETS,
    TRANSFORMS,
    Registry,
)

import zoo.eval.openmmlab.mmdet_plugin  # noqa: F401  (backbones, operations, and the hook)
from zoo.eval.dense.segment_data import LAYOUTS

# After the operations, which mmseg's imports need.
from mmcv.transforms import BaseTransform  # pyright: ignore[reportMissingImports]  # isort: skip
from mmseg.datasets import BaseSegDataset  # pyright: ignore[reportMissingImports]  # isort: skip

OUR_DATASETS = Registry("dataset", parent=DATASETS, scope="zoo")
OUR_TRANSFORMS = Registry("transform", parent=TRANSFORMS, scope="zoo")


@OUR_DATASETS.register_module()
class SegmentFolder(BaseSegDataset):
    """A part of a folder of images and masks, in any layout of `zoo.eval.dense.segment_data`.

    Args:
        path: The folder.
        layout: A key of `zoo.eval.dense.segment_data.LAYOUTS`.
        metainfo: The classes of the model.

    Raises:
        ValueError: the folder has other classes than when the configuration was made.
    """

    def __init__(
        self,
        path: str,
        *,
        layout: str,
        split: Literal["train", "val"],
        metainfo: Mapping[str, Any],
        **how: Any,
    ):
        train, val = LAYOUTS[layout][1](Path(path))
        self.part = {"train": train, "val": val}[split]
        if tuple(metainfo["classes"]) != self.part.classes:
            raise ValueError(
                f"{path} has {len(self.part.classes)} classes ({', '.join(self.part.classes[:5])}, "
                f"...), and the configuration has {len(metainfo['classes'])}, or others: make "
                "the configuration again."
            )
        super().__init__(metainfo=dict(metainfo), **how)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the files; `pair` is the index in the set."""
        return [
            dict(img_path=str(image), seg_map_path=str(mask), pair=i, seg_fields=[])
            for i, (image, mask) in enumerate(self.part.pairs)
        ]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return a pair's files and the set, which knows the meaning of a mask's values."""
        return super().get_data_info(idx) | dict(segments=self.part)


@OUR_TRANSFORMS.register_module()
class LoadClasses(BaseTransform):
    """Read a mask of 8 or 16 bits or with a palette as indices of classes; 255 is not scored."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_seg_map"] = results["segments"].target(results["pair"])
        results["seg_fields"].append("gt_seg_map")
        return results
