"""Write a student as an ordinary timm checkpoint, with the heads beside it."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.models._hub import save_for_hf
from timm.models._pretrained import filter_pretrained_cfg

from zoo import cut_format
from zoo.features import Batch
from zoo.files import checked, load_tensors, read_json, save_tensors
from zoo.students.build import build_heads, build_student
from zoo.students.start import FOLDER, HEADS, cut_folder
from zoo.students.student import Student

FIELDS: Mapping[str, Any] = dict(
    student=str,
    size=int,
    teachers=dict[str, list[int | None]],
    head=dict[str, Any],
    options=dict[str, Any] | None,  # exports before 0.2 have none
    own_heads=dict[str, dict[str, Any]] | None,
)
"""What `heads.json` must have, or may have."""


def _make_readable(folder: Path) -> None:
    """Let others read what was written: temporary folders and safetensors are private."""
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


def export_student(
    student: Student, folder: Path, batch: Batch, *, about: dict[str, Any] | None = None
) -> dict[str, float]:
    """Write a student to `folder`, whole or not at all.

    timm reads `model.safetensors` and `config.json`: `timm.create_model("local-dir:DIR",
    pretrained=True)`. What began in zoo's own form (`zoo.cut_format`) stays in it, which
    `zoo.create_model` reads. `heads.*` have the teachers' heads, in the teachers' own spaces.
    `check.safetensors` has the first image of `batch`, normalised, and the features that the loaded
    backbone must have for it.

    Licence and release of published weights are stated only if the student, whose heads must be
    folded, started from them: the name of a release also changes how RADIO is built.

    Args:
        about: Further fields of `heads.json`, beside those that rebuild the heads.

    Returns:
        Numbers by which a later run can compare the features of `check.safetensors`.
    """
    student = student.eval()
    images = ((batch.at(student.size)[:1] - student.mean) / student.std).contiguous()
    with torch.no_grad():
        summary, spatial = student.features(Batch(batch.images[:1]))
    assert summary is not None and spatial is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        arguments = _save_backbone(student, making)
        save_tensors(_contiguous(student.heads.state_dict()), making / "heads.safetensors")
        heads = dict(
            student=student.recipe[0],
            size=student.size[0],
            teachers={name: head.widths for name, head in student.heads.items()},
            head=student.head,
            tokens=student.tokens,
            own_heads={n: h.made for n, h in student.heads.items() if h.made != student.head},
            options={k: v for k, v in arguments.items() if k != "img_size"},
            about=about or {},
        )
        (making / "heads.json").write_text(json.dumps(heads, indent=2) + "\n")
        check = _contiguous(dict(images=images, summary=summary, spatial=spatial))
        save_tensors(check, making / "check.safetensors")
        _make_readable(making)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return {
        "export/summary_mean": summary.double().mean().item(),
        "export/summary_norm": summary.double().norm().item(),
        "export/spatial_norm": spatial.double().norm().item(),
    }


def _save_backbone(student: Student, folder: Path) -> dict[str, Any]:
    """Write the backbone's part of an export; return the keywords that build it again."""
    name, kwargs = student.recipe
    # `build_args` has what a family reads out of its weights' file about the architecture
    arguments = dict(getattr(student.backbone, "build_args", {})) | kwargs
    arguments.pop("num_classes", None)
    if source := cut_folder(name):
        cut_format.save_trained(student.backbone, source, folder, **kwargs)
    else:
        save_for_hf(
            student.backbone,
            str(folder),
            model_config=dict(pretrained_cfg=_pretrained_cfg(student)),
            model_args=arguments,
            safe_serialization=True,
        )
    return arguments


def _pretrained_cfg(student: Student) -> dict[str, Any]:
    """Describe the weights in full: timm before 1.0.31 adds nothing to what it gets."""
    cfg = filter_pretrained_cfg(
        cast(dict[str, Any], student.backbone.pretrained_cfg), remove_source=True, remove_null=True
    )
    for key in ("architecture", "pool_size"):  # the first is a field of its own, the second stale
        cfg.pop(key, None)
    cfg |= dict(input_size=[3, *student.size], num_classes=0, custom_load=False)
    cfg["license"] = student.license
    if student.license is None:
        cfg["tag"] = None
    return cfg


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def read_heads(folder: Path) -> dict[str, Any]:
    """Read what an export says of its student: name, options, size, heads.

    Raises:
        ValueError: there is no export in the folder, or what it says is damaged.
    """
    file = folder / HEADS
    if not file.is_file():
        raise ValueError(f"There is no exported student in {folder}: {HEADS} is missing.")
    found = read_json(file)
    for name, kind in FIELDS.items():
        checked(found.get(name), kind, f"{file}, field {name},")
    return found


def load_export(folder: Path, *, device: torch.device | str = "cpu") -> Student:
    """Build the student that `export_student` wrote, heads included.

    Raises:
        ValueError: there is no export in the folder, or it is damaged.
    """
    heads = read_heads(folder)
    if cut_format.is_cut_format(folder):
        heads["student"] = f"{FOLDER}{folder}"
    model, weights = (load_tensors(folder / f"{name}.safetensors") for name in ("model", "heads"))
    try:
        student = _built(heads)
        student.backbone.load_state_dict(model)
        student.heads.load_state_dict(weights)
    except (TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"The weights in {folder} do not fit its {HEADS}: {reason}") from error
    return student.to(device).eval()


def _built(heads: Mapping[str, Any]) -> Student:
    """Build the student that `heads.json` describes, with random weights."""
    widths = {name: tuple(pair) for name, pair in heads["teachers"].items()}
    options = heads.get("options")  # exports before 0.2 have none
    tokens = heads.get("tokens", {})  # of those the heads read the backbone's own summary
    student = build_student(
        heads["student"], widths, size=heads["size"], **heads["head"], options=options,
        tokens=tokens,
    )  # fmt: skip
    for label, own in heads.get("own_heads", {}).items():  # of an earlier run than the others
        one = {label: widths[label]}
        student.heads.update(build_heads(student.backbone, one, size=heads["size"], **own))
    return student
