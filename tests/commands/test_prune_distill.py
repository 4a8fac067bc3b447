"""A pruned model learns from its parent: in two commands and in one."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import zoo
from zoo.cli import main
from zoo.students.prune.library import Parent, save
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.setup import new_student, prepare

ARGUMENTS = dict(embed_dim=24, depth=3, num_heads=4, img_size=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Coloured squares, and a folder of timm with a tiny ViT of another mean than its name's."""
    place = tmp_path_factory.mktemp("heal")
    for split, count in (("train", 24), ("val", 8)):
        (place / "images" / split / "all").mkdir(parents=True)
        for i in range(count):
            few = np.random.default_rng([i, count]).integers(0, 255, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(few.repeat(16, 0).repeat(16, 1)).save(
                place / "images" / split / "all" / f"{i:02d}.png"
            )
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGUMENTS)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    save(Parent(model, "vit_tiny_patch16_224", ARGUMENTS), place / "vit")
    return place


def cut(place: Path, name: str) -> Path:
    out = place / name
    words = f"--to stream=0.5,layers=2 --data {place}/images --samples 8 --out {out}"
    main(["prune", str(place / "vit"), *words.split()])
    return out


FEW = "--batch 8 --calibration 4 --optim.ema 0 --every.log 1 --every.evaluate 2 --heads.hidden 16"


def test_a_pruned_student_starts_from_its_cut_weights_and_keeps_its_parent_and_other_teachers(
    place,
):
    child = cut(place, "child")
    names = (f"timm:local-dir:{place}/vit", "rule:edges@32")
    config = Distill(
        data=str(place / "images"), student=f"local-dir:{child}", size=32, batch=8, calibration=4,
        teachers=tuple(map(TeacherSpec.parse, names)), out=place / "unused", device="cpu",
    )  # fmt: skip
    setup = prepare(config)
    student = new_student(setup, {})
    weights = load_file(child / "model.safetensors")
    own = student.backbone.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in own)
    assert student.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    # and so does a run: at no rate, the export is the child
    words = f"--student local-dir:{child} --teachers {' '.join(names)} --size 32 --steps 2 {FEW}"
    rate = "--optim.lr 1e-12 --optim.min-lr 0 --optim.weight-decay 0"
    data = f"--data {place}/images --out {place}/two"
    main(["distill", *f"{words} {rate} {data}".split()])
    export = load_file(place / "two" / "export" / "model.safetensors")
    assert all(torch.allclose(export[name], weights[name], atol=1e-9) for name in export)
    last = json.loads((place / "two" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"vit/summary", "vit/spatial", "edges/spatial"} <= last.keys()
    model = timm.create_model(f"local-dir:{place}/two/export", pretrained=True)
    assert (model.embed_dim, len(model.blocks)) == (12, 2)


def test_what_is_no_folder_of_timm_cannot_be_a_student(place):
    with pytest.raises(ValueError, match="holds no model of timm"):
        zoo.distill(student="local-dir:nowhere", teachers=["rule:edges"], data=place / "images")
