"""Build a detector on a backbone, save it and load it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_model, save_model
from timm.data.config import resolve_model_data_config

from zoo.eval.detect.spec import STRIDES, BackboneSource, Detector, DetectorSpec
from zoo.files import checked, checked_fields, read_json, save_whole, written_whole
from zoo.students.build import build_student
from zoo.students.student import Student


def find_source(target: str, size: int, *, options: dict[str, Any] | None = None) -> BackboneSource:
    """Describe a backbone for a detector: its maps, options and weights; needs no memory.

    Args:
        target: A registered model (with a tag for its released weights), the folder of an exported
            student, or the folder of the run that trained it.
        size: Side of the detector's canvas, in pixels.
        options: Keywords of `timm.create_model`.

    Raises:
        ValueError: there is no such model, it refuses its options, or its maps suit no detector.
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
        raise ValueError(f"{name} returns no feature maps (timm's features_only); choose another.")
    reductions = [int(level["reduction"]) for level in info]
    levels, strides = _levels(reductions, name)
    if takes:
        side = size // 16 * strides[0] if len(strides) == 1 else size
        own["img_size"] = side
    return BackboneSource(
        name=name,
        options=own,
        levels=levels,
        strides=strides,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        getter=getter,
        weights=weights,
    )


def _named(target: str) -> tuple[str, str | None, dict[str, Any]]:
    """Return a registered name, timm's name of its weights if there are any, and its options."""
    folder = Path(target)
    if folder.is_dir():
        folder = folder / "export" if (folder / "export").is_dir() else folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no exported student: config.json is missing.")
        config = read_json(folder / "config.json")
        if not isinstance(config.get("architecture"), str):
            raise ValueError(
                f"{folder} holds no exported student: its config.json has no architecture."
            )
        stored = config.get("model_args") or {}
        options = dict(checked(stored, dict[str, Any], f"model_args in {folder / 'config.json'}"))
        options.pop("img_size", None)
        options.pop("num_classes", None)
        return config["architecture"], f"local-dir:{folder}", options
    if not timm.is_model(target.partition(".")[0]):
        raise ValueError(
            f"{target} is neither a registered model nor the folder of an exported student; "
            "`zoo list` shows our models, timm.list_models() all of them."
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
            f"of {', '.join(map(str, STRIDES))}, or the single one of a ViT."
        )
    return tuple(found.values()), tuple(found)


def build_detector(spec: DetectorSpec, *, pretrained: bool = False) -> Detector:
    """Build a detector; with `pretrained`, its backbone has the weights that `spec.source` names.

    Raises:
        ValueError: the detector does not take such a backbone, or needs a package that is not
            installed.
    """
    if spec.kind in ("mask_rcnn", "faster_rcnn", "retinanet"):
        from zoo.eval.detect.torchvision_detector import TorchvisionDetector

        return TorchvisionDetector(spec, pretrained=pretrained)
    from zoo.eval.detect.transformers_detector import TransformersDetector

    return TransformersDetector(spec, pretrained=pretrained)


def save_detector(detector: Detector, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, which `load_detector` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    # some detectors of transformers have a weight under two names; `save_model` handles this
    save_whole(detector, folder / "model.safetensors", save_model)
    about = dataclasses.asdict(detector.spec)
    with written_whole(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")


def is_detector(folder: Path) -> Path | None:
    """Return the folder of a saved detector: `detector` in this one, this one itself, or `None`."""
    for place in (folder / "detector", folder):
        config = place / "config.json"
        both = (place / "model.safetensors").is_file() and config.is_file()
        if both and {"kind", "source", "classes"} <= set(read_json(config)):
            return place
    return None


def load_detector(folder: Path, *, device: torch.device | str = "cpu") -> Detector:
    """Load a detector from the folder of `save_detector`, or from a run of `zoo detect`.

    Raises:
        ValueError: there is no detector, or its weights do not fit.
    """
    place = is_detector(folder)
    if place is None:
        raise ValueError(f"{folder} holds no trained detector; make one with `zoo detect`.")
    spec = read_spec(place / "config.json")
    detector = build_detector(spec)
    try:
        load_model(detector, place / "model.safetensors")
    except Exception as error:  # safetensors has errors of its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"The weights in {place} do not fit its config.json: {reason}") from error
    return detector.to(device).eval()


def load_backbone(folder: Path) -> Student:
    """Load the backbone of a trained detector, as a student without heads.

    A detector has no final norm, so the student's keeps its initial weights.

    Raises:
        ValueError: as `load_detector`.
    """
    detector = load_detector(folder)
    source = detector.spec.source
    options = {k: v for k, v in source.options.items() if k != "img_size"}
    side = source.options.get("img_size", detector.spec.size)
    student = build_student(source.name, {}, size=side, options=options).eval()
    state = {k.removeprefix("model."): v for k, v in detector.backbone.state_dict().items()}
    student.backbone.load_state_dict(state, strict=False)
    return student


def read_spec(file: Path) -> DetectorSpec:
    """Return the spec that was saved as `config.json`.

    Raises:
        ValueError: a field is missing or has another type.
    """
    content = read_json(file, dict[str, Any])
    about = checked(content.get("source"), dict[str, Any], f"{file}, field source,")
    source = checked_fields(BackboneSource, _tuples(about), f"{file}, field source,")
    return checked_fields(DetectorSpec, {**_tuples(content), "source": source}, str(file))


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
