"""`zoo elastic` sorts a vision model, and `zoo distill` trains its sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from zoo.axes import named_shapes
from zoo.cli import main
from zoo.data.loader import eval_batches
from zoo.data.sources import open_source
from zoo.eval.fidelity import fidelity
from zoo.students.export import load_export
from zoo.students.prune.elastic import parse_sizes, size_of
from zoo.students.prune.library import Parent, save
from zoo.students.prune.masked import Masked
from zoo.teachers.open import open_teacher

SIZES = "small:ffn=0.25,stream=0.5;medium:ffn=0.5,layers=1"


@pytest.fixture(scope="module")
def sorted_vit(tmp_path_factory):
    """A tiny ViT, some images, and the ViT sorted."""
    place = tmp_path_factory.mktemp("elastic_images")
    draws = np.random.default_rng(0)
    (place / "photos").mkdir()
    for number in range(40):
        coarse = draws.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(
            place / "photos" / f"{number}.png"
        )
    torch.manual_seed(0)
    options: dict[str, Any] = dict(embed_dim=24, depth=2, num_heads=4, img_size=32, num_classes=7)
    model = timm.create_model("vit_tiny_patch16_224", **options)
    save(Parent(model, "vit_tiny_patch16_224", options), place / "vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(place / "cache"))
        patch.chdir(place)
        sort("--out", "sorted")
        yield place


def sort(*words: str, sizes: str = SIZES, model: str = "vit") -> None:
    common = ["--data", "photos", "--calibration", "16", "--batch", "8"]
    main(["elastic", model, "--sizes", sizes, *common, *words])


def closeness(run: str) -> float:
    """How near the small size of a run's student is to its teacher."""
    student = load_export(Path(run) / "export")
    shapes = named_shapes(student.backbone)
    ranks = json.loads(Path("sorted/elastic.json").read_text())["ranks"]
    small = size_of(shapes, parse_sizes(SIZES)["small"], ranks)
    batches = list(eval_batches(open_source(Path("photos")), 32, 8))
    label, teacher = next(iter(student.heads)), open_teacher("timm:local-dir:vit@32")
    with Masked(student.backbone, shapes).at(small):
        return dict(fidelity(student, {label: teacher}, batches))[f"fidelity/{label}"]


def test_a_sorted_vit_is_the_same_classifier_and_any_size_of_it_exports(sorted_vit):
    images = torch.randn(2, 3, 32, 32)
    before, after = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        for folder in ("vit", "sorted")
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    main(["export", "sorted", "--size", "small", "--out", "small"])
    small: Any = timm.create_model("local-dir:small", pretrained=True)
    assert small.blocks[0].mlp.fc1.weight.shape == (24, 12)


def test_distillation_trains_every_size_of_a_sorted_student(sorted_vit):
    words = "--size 32 --batch 8 --steps 40 --optim.lr 1e-3 --optim.ema 0 --held-out 0.2"
    common = ["--data", "photos", "--teachers", "timm:local-dir:vit@32", *words.split()]
    main(["distill", "--student", "local-dir:sorted", *common, "--out", "run"])
    shutil.copytree("sorted", "plain")
    Path("plain/elastic.json").unlink()
    main(["distill", "--student", "local-dir:plain", *common, "--out", "whole"])
    assert closeness("run") > closeness("whole") + 0.02  # 1 is a constant guess
    for size, width in dict(small=12, medium=24, full=24).items():
        main(["export", "run", "--size", size, "--out", f"run-{size}"])
        model: Any = timm.create_model(f"local-dir:run-{size}", pretrained=True)
        assert model.num_features == width
        assert len(model.blocks) == (1 if size == "medium" else 2)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("vit", ("--router", "static", "--choices", "ffn=0.5|1.0"), "is no budget"),
        ("resnet18/random", (), "batch norms"),
        ("vit", ("--calibration", "1000"), "40 images"),
    ],
)
def test_what_cannot_be_sorted_is_refused(sorted_vit, capsys, model, words, message):
    sizes = "small:ffn=0.5" if model == "vit" else "small:stream=0.5"
    given = ["elastic", model, "--sizes", sizes, "--data", "photos", *words, "--out", "wrong"]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (sorted_vit / "wrong").exists()
