"""Tiny teachers of every library, through calibration, distillation and export, on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.commands.distill.run import distill
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import export_student, load_export
from zoo.teachers.open import open_teacher
from zoo.train.config import Every, Optim
from zoo.train.distill.config import Distill, Heads, TeacherSpec

SIDE = 64
MODULES = """
import torch
from torch import nn
from zoo.features import Features

class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 12, 8, 8)
    def forward(self, x):
        x = self.conv(x)
        return Features(x.mean((2, 3)), x.permute(0, 2, 3, 1))

def cells():
    return Cells()

def map_alone():
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.Conv2d(16, 8, 4, 4))
"""


def of_timm(folder: Path) -> list[str]:
    return [f"timm:test_vit/random@{SIDE}", f"timm:test_convnext/random@{SIDE}"]


def of_zoo(folder: Path) -> list[str]:
    """One of the families, and the student of an earlier run (another library's architecture)."""
    student = build_student("test_vit", {}, size=SIDE).eval()
    export_student(student, folder / "earlier", Batch(torch.rand(1, 3, SIDE, SIDE)))
    return [f"zoo:eradio_nano/random@{SIDE}", f"zoo:local-dir:{folder / 'earlier'}"]


def of_torch(folder: Path) -> list[str]:
    (folder / "three_cells.py").write_text(MODULES)
    return [f"torch:three_cells.{name}@{SIDE}" for name in ("cells", "map_alone")]


def of_open_clip(folder: Path) -> list[str]:
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    return ["open_clip:tiny-vit/random", "open_clip:tiny-resnet/random"]


def of_hf(folder: Path) -> list[str]:
    hf = pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")
    small = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, image_size=SIDE)
    dino = hf.Dinov2Model(hf.Dinov2Config(**small, patch_size=8, mlp_ratio=2))
    dino.save_pretrained(folder / "dino")
    square = dict(height=SIDE, width=SIDE)
    hf.BitImageProcessor(size=square, crop_size=square).save_pretrained(folder / "dino")
    sam = hf.SamVisionConfig(
        **small,
        output_channels=16,
        patch_size=8,
        mlp_dim=32,
        window_size=3,
        global_attn_indexes=[1],
        num_pos_feats=8,
    )
    hf.SamModel(hf.SamConfig(vision_config=sam)).save_pretrained(folder / "sam")
    sizes = dict(size=dict(longest_edge=SIDE), pad_size=square)
    hf.SamImageProcessor(**sizes).save_pretrained(folder / "sam")
    return [f"hf:{folder / name}" for name in ("dino", "sam")]


LIBRARIES: dict[str, Callable[[Path], list[str]]] = dict(
    timm=of_timm, zoo=of_zoo, torch=of_torch, open_clip=of_open_clip, hf=of_hf
)
HEADS = dict(timm="ladder", zoo="v1", torch="v2", open_clip="attn", hf="v2")


@pytest.fixture
def photos(tmp_path):
    for i in range(12):
        draws = np.random.default_rng(i)
        coarse = draws.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


@pytest.mark.slow  # a whole run each
@pytest.mark.parametrize("library", LIBRARIES)
def test_two_architectures_of_each_library_are_distilled_and_exported(
    library, photos, request, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    names = LIBRARIES[library](tmp_path)
    if library == "open_clip":
        request.getfixturevalue("tiny")
    run = distill(
        Distill(
            data=str(photos),
            teachers=tuple(TeacherSpec(name=name) for name in names),
            student="test_vit",
            size=SIDE,
            batch=4,
            steps=12,
            calibration=3,
            held_out=0.2,
            out=tmp_path / "run",
            device="cpu",
            heads=Heads(kind=HEADS[library], hidden=32, upsample=2 if library == "hf" else 1),
            optim=Optim(lr=3e-3, ema=0.5),
            every=Every(log=4, checkpoint=12, evaluate=12),
        )
    )
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    arms = {row["arm"]: row for row in rows if row["kind"] == "eval"}
    assert arms["student"]["fidelity/min"] > arms["untrained"]["fidelity/min"]

    student = load_export(run.path / "export")
    batch = Batch(torch.rand(2, 3, SIDE, SIDE))
    answers = student(batch)
    for name, label in zip(names, run.config(Distill).labels, strict=True):
        for ours, theirs in zip(answers[label], open_teacher(name)(batch), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or ours.shape[-1] == theirs.shape[-1]
    check = load_file(run.path / "export" / "check.safetensors")
    alone = timm.create_model(f"local-dir:{run.path / 'export'}", pretrained=True).eval()
    with torch.no_grad():
        summary = alone.forward_head(alone.forward_features(check["images"]), pre_logits=True)
    torch.testing.assert_close(summary, check["summary"])
