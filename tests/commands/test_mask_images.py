"""`zoo mask` on a vision model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from zoo.cli import main
from zoo.students.prune.library import Parent, save
from zoo.students.prune.nm import Pattern, sparse_layers
from zoo.train.run import Run

TWO = Pattern(2, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier and pictures: blobs of few colours, so that features differ."""
    place = tmp_path_factory.mktemp("mask_images")
    (place / "photos").mkdir()
    draws = np.random.default_rng(0)
    for i in range(16):
        pixels = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
        image.save(place / "photos" / f"{i}.png")
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(num_classes=10, img_size=64)
    (place / "parent").mkdir()
    save(
        Parent(timm.create_model("test_vit", **arguments), "test_vit", arguments), place / "parent"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(place / "cache"))
        patch.chdir(place)
        yield place


def masked(method: str, *words: str, name: str = "") -> dict:
    common = ["--data", "photos", "--batch", "4", "--calibration", "3", "--held-out", "0.25"]
    out = ("--out", name or method)
    main(["mask", "parent", "--method", method, *common, *out, *words])
    return json.loads(Path(name or method, "about.json").read_text())["results"]


def exported(name: str) -> dict[str, torch.Tensor]:
    model = timm.create_model(f"local-dir:{name}", pretrained=True)
    assert model.num_classes == 10
    return {name: layer.weight for name, layer in sparse_layers(model, TWO).items()}


LEARN = ("--steps", "30", "--optim.lr", "3e-3")


@pytest.fixture(scope="module")
def learned(place):
    return masked("learned", *LEARN)


def test_updates_and_learning_bring_a_thinned_classifier_back(place, learned, capsys):
    found = {method: masked(method)[method] for method in ("magnitude", "sparsegpt")}
    assert "agreement" in capsys.readouterr().out
    for measure in ("fidelity/parent", "cosine/parent/summary"):
        assert found["sparsegpt"][measure] > found["magnitude"][measure]
    far = {name: 1 - values["cosine/parent/summary"] for name, values in learned.items()}
    assert far["learned"] < 0.3 * far["begins"]
    assert learned["dense"]["agreement"] == 1
    assert learned["dense"]["cosine/parent/summary"] == pytest.approx(1)
    dense = exported("parent")
    for method in ("magnitude", "sparsegpt", "learned"):
        for name, weight in exported(f"{method}/export").items():
            assert TWO.holds(weight)
            assert (weight != 0).float().mean() > 0.49
            if method != "sparsegpt":  # the weights that stay are the parent's
                assert torch.equal(weight, torch.where(weight != 0, dense[name], 0))


def test_masks_are_learnt_on_from_those_of_another_run(place, learned):
    before = exported("learned/export")
    found = masked("learned", "--prior", "learned", "--steps", "1", name="transfer")
    agreement = [
        ((weight != 0) == (before[name] != 0)).view(-1, 4).all(-1).float().mean()
        for name, weight in exported("transfer/export").items()
    ]
    assert torch.stack(agreement).mean() > 0.85  # logits are drawn around the prior
    measure = "cosine/parent/summary"
    assert found["begins"][measure] > learned["begins"][measure] + 0.1


def test_a_stopped_run_goes_on_to_the_same_masks(place):
    masked("learned", "--steps", "6", "--every.checkpoint", "3", name="stopped")
    expected, folder = exported("stopped/export"), place / "stopped"
    last = Run(folder).checkpoints()[-1]
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    (folder / "about.json").unlink()
    shutil.rmtree(folder / "export")
    main(["mask", "--resume", "stopped"])
    for name, weight in exported("stopped/export").items():
        assert torch.equal(weight, expected[name])


def test_other_teachers_teach_beside_the_dense_model_through_heads(place):
    words = ("--teachers", "timm:test_vit2/random,summary=0.5", "--heads.hidden", "32", *LEARN)
    found = masked("learned", *words, name="two")
    for measure in ("fidelity/test_vit2", "cosine/test_vit2/summary", "cosine/parent/summary"):
        assert found["learned"][measure] > found["begins"][measure] + 0.1
    first = json.loads((place / "two" / "metrics.jsonl").read_text().splitlines()[0])
    terms = {"parent/summary", "parent/spatial", "test_vit2/summary", "test_vit2/spatial"}
    assert terms <= first.keys()


def test_a_dry_run_says_what_is_thinned_and_leaves_nothing(place, capsys):
    main(["mask", "parent", "--data", "photos", "--method", "learned", "--out", "dry", "--dry-run"])
    printed = capsys.readouterr().out
    weights = sum(weight.numel() for weight in exported("parent").values())
    assert f"{weights / 1e6:.2f} M weights" in printed
    assert f"{weights * 6 / 4 / 1e6:.2f} M logits" in printed
    assert not (place / "dry").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "wanda", "--teachers", "timm:test_vit2/random"), "has no teachers"),
        (("--method", "learned", "--prior", "parent"), "parent is not 2:4"),
        (("--method", "learned", "--prior", "nowhere"), "nowhere is no folder"),
        (("--method", "learned", "--losses.mesa", "1"), "give 0 for both"),
        (("--data", "nowhere"), "There is no data at nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(place, capsys, words, message):
    data = () if "--data" in words else ("--data", "photos")
    with pytest.raises(SystemExit) as stopped:
        main(["mask", "parent", *data, "--out", "wrong", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (place / "wrong").exists()
