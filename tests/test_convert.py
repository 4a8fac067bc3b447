"""Converting an official file into a folder that timm builds by itself."""

import argparse
import json

import pytest
import timm
import torch

from zoo.cli import main
from zoo.convert import convert
from zoo.radio_weights import published

TINY = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8)
HEADS = dict(clip=dict(token=0, summary=dict(hidden=8, out_dim=6, num_inner=1)))


@pytest.fixture
def parent(golden):
    model = timm.create_model(
        "radio_vit_base_patch16",
        init_values=1e-5,
        reg_tokens=2,
        summary_idxs=(1,),
        max_img_size=64,
        align_corners=True,
        adaptors=HEADS,
        **TINY,
    ).eval()
    golden.fill(model)
    return model


@pytest.fixture
def source(parent, tmp_path):
    torch.save(dict(model=published(parent.state_dict())), tmp_path / "official.pth.tar")
    return tmp_path / "official.pth.tar"


def test_timm_builds_the_converted_model_from_its_folder(parent, source, tmp_path):
    out = convert(
        source, "radio_vit_base_patch16.c_radio_v3", tmp_path / "out", adaptors=HEADS, **TINY
    )
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.rand(2, 3, 24, 16)
    torch.testing.assert_close(model.radio(x), parent.radio(x))
    assert model.pretrained_cfg["license"] == "nvidia-open-model-license"
    untrained = timm.create_model(f"local-dir:{out}")
    assert list(untrained.state_dict()) == list(model.state_dict())


def test_the_configuration_says_nothing_of_the_source(source, tmp_path):
    out = convert(source, "radio_vit_base_patch16", tmp_path / "out", **TINY)
    text = (out / "config.json").read_text()
    assert str(tmp_path) not in text
    config = json.loads(text)
    assert config["architecture"] == "radio_vit_base_patch16"
    assert config["model_args"]["reg_tokens"] == 2
    assert config["num_classes"] == 0


def test_other_families_convert_too(tmp_path):
    import zoo  # noqa: F401  for its names

    parent = timm.create_model("eradio_nano").eval()
    torch.save(parent.state_dict(), tmp_path / "nano.pth")
    out = convert(tmp_path / "nano.pth", "eradio_nano", tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(model(x), parent(x))


def test_what_does_not_fit_is_listed_ten_of_each(tmp_path):
    state = timm.create_model("eradio_nano").state_dict()
    dropped = [k for k in state if k.startswith("stages.2.") and "num_batches" not in k]
    kept = {key: value for key, value in state.items() if key not in dropped}
    torch.save(kept | {"stray": torch.ones(1)}, tmp_path / "nano.pth")
    with pytest.raises(ValueError, match=r"nano.pth does not fit eradio_nano") as error:
        convert(tmp_path / "nano.pth", "eradio_nano", tmp_path / "out")
    assert f"{len(dropped)} missing: " in str(error.value)
    assert str(error.value).count("stages.2.") == 10
    assert "1 extra: stray" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_conversion_leaves_the_earlier_one_whole(source, tmp_path, monkeypatch):
    out = convert(source, "radio_vit_base_patch16", tmp_path / "out", **TINY)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.convert.save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert(source, "radio_vit_base_patch16", out, **TINY)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_command_line_converts_and_says_how_to_load(tmp_path, capsys):
    path, out = tmp_path / "nano.pth.tar", tmp_path / "out"
    model = timm.create_model("eradio_nano")
    args = argparse.Namespace(output=tmp_path)  # which timm alone does not read
    torch.save(dict(state_dict_ema=model.state_dict(), args=args), path)
    main(["convert", str(path), "eradio_nano", str(out)])
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in capsys.readouterr().out
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(SystemExit):
        main(["convert", str(path), "eradio_xxxtiny", str(out)])
    told = capsys.readouterr().err
    assert "does not fit eradio_xxxtiny" in told and told.count("\n") == 1


def test_unknown_names_and_files_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no model 'radio_xl'"):
        convert(source, "radio_xl", tmp_path / "out")
    with pytest.raises(ValueError, match="no weight file"):
        convert(tmp_path / "nowhere.pth", "eradio_nano", tmp_path / "out")
