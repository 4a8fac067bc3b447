"""The commands as functions: what they take, what they give, what they refuse."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo.train.distill.config import Distill


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that any network tells apart by their brightness."""
    root = tmp_path_factory.mktemp("library") / "photos"
    draws = np.random.default_rng(0)
    for split, each in (("train", 8), ("val", 4)):
        for number, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = 20 + 200 * number + draws.normal(0, 4, (32, 32, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


SMALL = dict(
    teachers=["rule:edges@32", "timm:test_vit/random@32,spatial=0.5"],
    student="test_vit",
    size=32,
    batch=4,
    steps=2,
    calibration=1,
    device="cpu",
)


def test_one_call_distills_and_another_measures_what_came_out(photos, tmp_path):
    run = zoo.distill(data=photos, out=tmp_path / "run", optim=dict(lr=1e-4), **SMALL)
    assert (run.path / "report.html").is_file() and (run.path / "export").is_dir()
    config = run.config(Distill)
    assert config.optim.lr == 1e-4 and config.optim.warmup == Distill().optim.warmup
    assert config.teachers[1].spatial == 0.5 and config.data == str(photos)
    again = zoo.distill(resume=run.path, device="cpu")  # nothing is left to do but the end
    assert again.path == run.path
    (record,) = zoo.evaluate(run.path / "export", on="knn", data=photos, knn=dict(k=3))
    assert record.values["knn/top1"] == 100 and record.settings["k"] == 3


def test_a_recipe_by_name_and_a_whole_config_can_be_changed_too(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'quikstart'.*Did you mean quickstart"):
        zoo.distill("quikstart")
    with pytest.raises(ValueError, match=r"no field stepz\. Did you mean steps"):
        zoo.distill("quickstart", stepz=3)
    with pytest.raises(ValueError, match="There is no data at"):
        zoo.distill(Distill(out=tmp_path / "run"), data=tmp_path / "nowhere", **SMALL)
    with pytest.raises(ValueError, match="leave out recipe"):
        zoo.distill("quickstart", resume=tmp_path)


def test_stored_features_are_measured_like_images(photos, tmp_path):
    out = zoo.embed(photos, tmp_path / "features", model="test_vit", size=64, batch=4, kind="npz")
    assert json.loads((out / "index.json").read_text())["command"].startswith("zoo.embed(")
    stored = zoo.evaluate(features=out, on=["knn"])
    live = zoo.evaluate("test_vit", data={"knn": photos}, on=["knn"], size=64)
    assert stored[0].values == live[0].values == {"knn/top1": 100, "knn/mean_per_class": 100}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(on="kn", data="."), r"Did you mean knn\?"),
        (dict(on="knn"), "knn needs data"),
        (dict(on="knn", data=".", sizes=64), r"no field sizes\. Did you mean size\?"),
        (dict(on="knn", data=".", knn=dict(kk=3)), r"no field kk\. Did you mean k\?"),
        (dict(on="knn", data=".", linear=dict(batch=3)), "settings for linear"),
        (dict(on="knn", data={"linear": "."}), "data for linear"),
        (dict(on="knn", data=".", precision="fp8"), "precision is 'fp8'; it must be 'float32' or"),
    ],
)
def test_a_wrong_request_is_refused_with_the_nearest_name(fields, message):
    with pytest.raises(ValueError, match=message):
        zoo.evaluate("test_vit", **fields)


def test_embed_refuses_what_it_has_no_field_for(tmp_path):
    with pytest.raises(ValueError, match=r"no field worker\. Did you mean workers\?"):
        zoo.embed(tmp_path, tmp_path / "out", model="test_vit", worker=2)


def test_the_functions_are_there_before_anything_heavy_is():
    code = (
        "import sys, zoo; zoo.distill, zoo.evaluate, zoo.embed; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
