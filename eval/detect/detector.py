"""What a detector is here, how one is made from a backbone, and its files."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import load_model, save_model
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from zoo.checkpoint import save_whole, written_whole
from zoo.eval.detect.canvas import GRID, Canvas
from zoo.eval.detect.coco_metric import Prediction

Kind = Literal["mask_rcnn", "faster_rcnn", "retinanet", "detr", "rt_detr_v2", "mask2former"]
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A backbone: what timm builds it from, and where its first weights are."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    levels: tuple[int, ...]
    """`out_indices` of the maps that are used: of the strides 4 to 32, or a ViT's last."""
    strides: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    getter: bool = True
    weights: str | None = None
    """What `timm.create_model` loads; `None` starts at random."""

    @property
    def plain(self) -> bool:
        """Tell a ViT, whose maps all have one size, from a pyramid."""
        return len(self.strides) == 1

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """Build timm's feature extractor, with the first weights if they are asked for.

        Raises:
            ValueError: timm refuses.
        """
        how: dict[str, Any] = dict(feature_cls="getter") if self.getter else {}
        name = self.weights if pretrained and self.weights else self.name
        try:
            return timm.create_model(
                name, pretrained=pretrained and self.weights is not None, features_only=True,
                out_indices=self.levels, **self.options, **how,
            )  # fmt: skip
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name} cannot be a detector's backbone: {reason}.") from error


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that rebuilds a detector, its weights apart."""

    kind: Kind
    source: Source
    classes: tuple[str, ...]
    size: int = 512
    """Side of the canvas, a multiple of 32; the longer side of an image becomes this."""
    width: int = 256
    """Channels of the pyramid and of the heads; the published detectors have 256."""
    class_agnostic: bool = False
    score: float = 0.05
    """Least score of a box that is given."""

    def __post_init__(self):
        if self.size < GRID or self.size % GRID:
            near = max(GRID, round(self.size / GRID) * GRID)
            raise ValueError(f"size {self.size} is no multiple of {GRID}; the nearest is {near}.")

    @property
    def has_masks(self) -> bool:
        """Tell whether the detector learns and gives masks."""
        return self.kind in ("mask_rcnn", "mask2former")


class Detector(nn.Module):
    """Losses of a batch with its objects, and predictions of a batch.

    Backbone and pyramid run in `precision`; what places boxes stays in float32, since eight bits
    of mantissa do not hold a coordinate to a pixel.
    """

    spec: Spec
    precision: torch.dtype = torch.float32

    def losses(self, batch: Canvas) -> dict[str, Tensor]:
        """Give the named losses, scalars to be summed."""
        raise NotImplementedError

    def predict(self, batch: Canvas) -> list[Prediction]:
        """Find the objects, in the pixels of the original images, best first."""
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:
        """Give timm's feature extractor."""
        raise NotImplementedError


def find_source(target: str, size: int, *, options: dict[str, Any] | None = None) -> Source:
    """Look at what a backbone has to offer; costs no memory.

    `target` is a registered model (with a tag for its released weights), the folder of an
    exported student, or that of the run which made it.

    Raises:
        ValueError: there is no such model, or its maps suit no detector.
    """
    name, weights, own = _named(target)
    own |= options or {}
    try:
        with torch.device("meta"):
            # by the name of its weights, for their mean and standard deviation
            model: Any = timm.create_model(weights or name, num_classes=0, **own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} refuses its options {own}: {error}.") from error
    takes = hasattr(model, "set_input_size")
    getter = hasattr(model, "forward_intermediates")
    config: dict[str, Any] = resolve_model_data_config(model)
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ValueError(f"{name} gives no feature maps (timm's features_only); choose another.")
    reductions = [int(level["reduction"]) for level in info]
    levels, strides = _levels(reductions, name)
    if takes:
        side = size // 16 * strides[0] if len(strides) == 1 else size
        own["img_size"] = side
    return Source(
        name=name, options=own, levels=levels, strides=strides,
        mean=tuple(config["mean"]), std=tuple(config["std"]),
        getter=getter, weights=weights,
    )  # fmt: skip


def _named(target: str) -> tuple[str, str | None, dict[str, Any]]:
    """Give a registered name, what timm loads its weights by, and its options."""
    folder = Path(target)
    if folder.is_dir():
        folder = folder / "export" if (folder / "export").is_dir() else folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no exported student: config.json is missing.")
        config = json.loads((folder / "config.json").read_text())
        if "architecture" not in config:
            raise ValueError(f"{folder} holds no exported student: {folder}/config.json is other.")
        options = dict(config.get("model_args") or {})
        options.pop("img_size", None)
        options.pop("num_classes", None)
        return config["architecture"], f"local-dir:{folder}", options
    if not timm.is_model(target.partition(".")[0]):
        raise ValueError(
            f"{target} is neither a registered model nor a folder of an exported student; "
            "`zoo list` shows our models, timm.list_models() the others."
        )
    name, _, tag = target.partition(".")
    return name, target if tag else None, {}


def _levels(reductions: list[int], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if len(set(reductions)) == 1:
        return (len(reductions) - 1,), (reductions[0],)
    found: dict[int, int] = {}
    for index, stride in enumerate(reductions):
        if stride in STRIDES and stride not in found:
            found[stride] = index
    if len(found) < 2:
        raise ValueError(
            f"{name} has maps of strides {sorted(set(reductions))}; a detector needs two or more "
            f"of {', '.join(map(str, STRIDES))}, or a ViT's single one."
        )
    return tuple(found.values()), tuple(found)


def build_detector(spec: Spec, *, pretrained: bool = False) -> Detector:
    """Build a detector; its backbone starts with its own weights if `pretrained`.

    Raises:
        ValueError: the detector does not take such a backbone, or needs a missing package.
    """
    if spec.kind in ("mask_rcnn", "faster_rcnn", "retinanet"):
        from zoo.eval.detect.torchvision_detector import TorchvisionDetector

        return TorchvisionDetector(spec, pretrained=pretrained)
    from zoo.eval.detect.transformers_detector import TransformersDetector

    return TransformersDetector(spec, pretrained=pretrained)


def save_detector(detector: Detector, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, from which it can be built anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    # some of transformers' detectors have a weight under two names, which only these two know of
    save_whole(detector, folder / "model.safetensors", save_model)
    about = dataclasses.asdict(detector.spec)
    with written_whole(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")


def is_detector(folder: Path) -> Path | None:
    """Give the folder of a saved detector: this one, or `detector` inside a run."""
    for place in (folder / "detector", folder):
        config = place / "config.json"
        if (place / "model.safetensors").is_file() and config.is_file():
            content = json.loads(config.read_text())
            if {"kind", "source", "classes"} <= set(content):
                return place
    return None


def load_detector(folder: Path, *, device: torch.device | str = "cpu") -> Detector:
    """Build the detector that `save_detector` wrote, or that a run holds.

    Raises:
        ValueError: there is none, or its weights do not fit.
    """
    place = is_detector(folder)
    if place is None:
        raise ValueError(f"{folder} holds no trained detector; make one with `zoo detect`.")
    spec = read_spec(json.loads((place / "config.json").read_text()))
    detector = build_detector(spec)
    try:
        load_model(detector, place / "model.safetensors")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The weights in {place} do not fit its config.json: {reason}") from error
    return detector.to(device).eval()


def read_spec(content: dict[str, Any]) -> Spec:
    """Make a spec of what its JSON form says."""
    source: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in content["source"].items()
    }
    rest: dict[str, Any] = {
        **content,
        "source": Source(**source),
        "classes": tuple(content["classes"]),
    }
    return Spec(**rest)
