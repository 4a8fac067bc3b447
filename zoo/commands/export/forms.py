"""The forms of an exported student: timm's folder, transformers', ONNX, torch.export, the Hub."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.commands.export.model_card import card_of
from zoo.eval.results import Record
from zoo.files import load_tensors
from zoo.language.bars import bars_for_large
from zoo.students.export import load_export

LARGEST = 1024
"""Most images of a batch that an exported program takes."""


def write_form(
    export: Path, to: str, out: Path | None, *, repo: str = "", records: Sequence[Record] = ()
) -> str:
    """Write an export in another form, with its card; return where it is.

    What computes is checked against the export's own features before anything is left at `out`.

    Args:
        to: `timm`, `transformers`, `onnx`, `pt2` or `hub`.
        repo: ORG/NAME on the Hub.

    Raises:
        ValueError: there is no export, a package is missing, or the form computes something else.
    """
    if not (export / "heads.json").is_file():
        raise ValueError(
            f"{export} holds no exported student; zoo distill and zoo export make one."
        )
    if to == "hub":
        return push(export, repo, records)
    if out is None:
        raise ValueError(f"--to {to} needs --out, the folder that it writes.")
    out.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        FORMS[to](export, making)
        (making / "README.md").write_text(card_of(export, records=records), encoding="utf-8")
        making.chmod(0o755)
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return str(out)


class Outputs(nn.Module):
    """Normalised images -> summary [B D] and spatial map [B h w C], as plain tensors."""

    def __init__(self, student: Any):
        super().__init__()
        self.student = student

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.student.forward_features(images)
        return out.summary, out.spatial


def _program(export: Path) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return a student's backbone for images in [0, 1], an example of two, and its features."""
    student = load_export(export).eval()
    student.heads = nn.ModuleDict()
    check = load_tensors(export / "check.safetensors")
    pixels = check["images"] * student.std + student.mean
    return Outputs(student).eval(), pixels, (check["summary"], check["spatial"])


def _agree(found: Sequence[Any], wanted: Sequence[torch.Tensor], what: str) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        gap = (torch.as_tensor(ours) - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        if not gap < 1e-3:
            raise ValueError(f"The {what} form's features differ by {gap:.2g} from the export's.")


def _timm(export: Path, out: Path) -> None:
    shutil.copytree(export, out, dirs_exist_ok=True)


def _pt2(export: Path, out: Path) -> None:
    model, pixels, wanted = _program(export)
    two = pixels.repeat(2, 1, 1, 1)
    batch = torch.export.Dim("batch", min=1, max=LARGEST)
    program = torch.export.export(model, (two,), dynamic_shapes=({0: batch},))
    torch.export.save(program, out / "model.pt2")
    with torch.no_grad():
        _agree(torch.export.load(out / "model.pt2").module()(pixels), wanted, "pt2")


def _onnx(export: Path, out: Path) -> None:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(
            "--to onnx needs onnx, onnxscript and onnxruntime: pip install onnx onnxscript "
            "onnxruntime."
        ) from error
    model, pixels, wanted = _program(export)
    two = pixels.repeat(2, 1, 1, 1)
    batch = torch.export.Dim("batch", min=1, max=LARGEST)
    torch.onnx.export(
        model,
        (two,),
        str(out / "model.onnx"),
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        output_names=["summary", "spatial"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(out / "model.onnx")
    _agree(session.run(None, {"images": pixels.numpy()}), wanted, "ONNX")


def _transformers(export: Path, out: Path) -> None:
    from zoo.multimodal.open import open_tower

    tower = open_tower(f"local-dir:{export}", balanced=False).eval()
    with bars_for_large(tower):
        tower.save_pretrained(out)
    check = load_tensors(export / "check.safetensors")
    student = load_export(export)
    with torch.no_grad():
        pixels = check["images"] * student.std + student.mean
        found = tower(pixel_values=pixels).last_hidden_state
    _agree([found], [check["spatial"].flatten(1, 2)], "transformers")


FORMS: Mapping[str, Callable[[Path, Path], None]] = {
    "timm": _timm,
    "transformers": _transformers,
    "onnx": _onnx,
    "pt2": _pt2,
}


def push(export: Path, repo: str, records: Sequence[Record] = ()) -> str:
    """Upload an export with its card; timm then loads `hf-hub:ORG/NAME`.

    The server is the Hub, or the one that `HF_ENDPOINT` names; the token is the user's own.

    Raises:
        ValueError: no repository is named, or the server refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if repo.count("/") != 1:
        raise ValueError("--to hub needs --repo ORG/NAME.")
    card = card_of(export, records=records, repo=repo)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        shutil.copytree(export, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        try:
            api.create_repo(repo, exist_ok=True)
            done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="zoo export")
        except HfHubHTTPError as error:
            raise ValueError(f"{api.endpoint} refused {repo}: {error}") from error
    return str(done)
