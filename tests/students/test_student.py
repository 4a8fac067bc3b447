import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from zoo.features import Batch
from zoo.students.export import export_student, load_export
from zoo.students.student import build_student, read_options, student_grids

WIDTHS = {"a": (24, 16), "b": (None, 8), "c": (12, None)}


def tiny(name="test_vit", size=160, **kwargs):
    torch.manual_seed(1)
    return build_student(name, WIDTHS, size=size, **kwargs)


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 96), ("resnet10t", 64), ("eradio_nano", 64)]
)
def test_every_head_answers_for_what_its_teacher_has_and_learns(name, size, kind):
    student = tiny(name, size, kind=kind, hidden=20)
    ours = student(Batch(torch.rand(2, 3, 40, 48)))
    grid = ours["a"].spatial.shape[1:3]
    assert ours["a"].summary.shape == (2, 24) and ours["a"].spatial.shape == (2, *grid, 16)
    assert ours["b"].summary is None and ours["b"].spatial.shape == (2, *grid, 8)
    assert ours["c"].spatial is None and ours["c"].summary.shape == (2, 12)
    sum(x.square().mean() for pair in ours.values() for x in pair if x is not None).backward()
    assert all(p.grad is not None for p in student.heads.parameters())


def test_folding_changes_the_copy_and_not_the_student():
    student = tiny().eval()
    batch = Batch(torch.rand(2, 3, 160, 160))

    def double(last: nn.Linear) -> nn.Linear:
        changed = nn.Linear(last.in_features, last.out_features)
        changed.load_state_dict({k: 2 * v for k, v in last.state_dict().items()})
        return changed

    before = student(batch)
    shown = student.with_folded_heads({"a": double})
    torch.testing.assert_close(shown(batch)["a"].spatial, 2 * before["a"].spatial)
    torch.testing.assert_close(shown(batch)["b"].spatial, before["b"].spatial)
    torch.testing.assert_close(student(batch)["a"].spatial, before["a"].spatial)
    assert shown.backbone is student.backbone


def test_a_size_that_the_backbone_cannot_take_is_refused_with_what_it_can():
    with pytest.raises(ValueError, match="100"):
        build_student("eradio_nano", WIDTHS, size=100)


LOAD = """
import json, sys, timm, torch
from safetensors.torch import load_file
folder, name, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if name.startswith("eradio"):
    import zoo
check = load_file(folder + "/check.safetensors")
model = timm.create_model(name, checkpoint_path=folder + "/model.safetensors", **kwargs).eval()
hub = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    for m in (model, hub):
        final, maps = m.forward_intermediates(check["images"], indices=1, norm=True)
        torch.testing.assert_close(m.forward_head(final, pre_logits=True), check["summary"])
        torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), check["spatial"])
assert not any(m.startswith(("zoo.train", "zoo.students", "zoo.teachers")) for m in sys.modules)
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("eradio_nano", 128, {}),
        ("resnet10t", 96, dict(num_classes=0)),
        ("test_vit", 96, dict(num_classes=0, img_size=96)),
    ],
)
def test_an_export_is_an_ordinary_timm_checkpoint(tmp_path, name, size, kwargs):
    student = tiny(name, size)
    batch = Batch(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    export_student(student, tmp_path / "export", batch)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "export"), name, json.dumps(kwargs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr


def test_an_exported_student_comes_back_with_its_heads(tmp_path):
    student = tiny().eval()
    batch = Batch(torch.rand(2, 3, 160, 160))
    numbers = export_student(student, tmp_path / "export", batch)
    back = load_export(tmp_path / "export")
    for name, ours in student(batch).items():
        for mine, theirs in zip(ours, back(batch)[name], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs)
    check = load_file(tmp_path / "export" / "check.safetensors")
    assert numbers["export/summary_norm"] == check["summary"].double().norm().item()
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architecture"] == "test_vit" and timm.is_model(config["architecture"])


def test_a_folder_without_an_export_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"heads\.json is missing"):
        load_export(tmp_path)


def test_options_are_read_as_python_writes_them():
    texts = ("crop_positions=False", 'vitdet={"window": 8}', "drop_rate=0.5", "act_layer=gelu")
    assert read_options(texts) == dict(
        crop_positions=False, vitdet={"window": 8}, drop_rate=0.5, act_layer="gelu"
    )
    for wrong, match in (("depth", "key=value"), ("img_size=64", "decided by the run")):
        with pytest.raises(ValueError, match=match):
            read_options((wrong,))


def test_an_option_reaches_the_backbone_and_the_export(tmp_path):
    options = dict(init_values=0.25, reg_tokens=2)
    student = tiny(options=options).eval()
    assert student.backbone.blocks[0].ls1.gamma.unique().item() == 0.25
    assert student.backbone.num_prefix_tokens == 3
    export_student(student, tmp_path / "export", Batch(torch.rand(1, 3, 160, 160)))
    assert load_export(tmp_path / "export").backbone.num_prefix_tokens == 3
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert options.items() <= config["model_args"].items()
    with pytest.raises(ValueError, match="test_vit refuses its options"):
        tiny(options=dict(windows=3))


@pytest.mark.parametrize("name", ["test_vit", "eradio_nano", "resnet10t"])
def test_a_student_for_several_sizes_answers_on_the_grid_that_was_promised(name):
    grids = student_grids(name, 160, (160, 96, 224))
    student = tiny(name, dynamic=True)
    for size, grid in grids.items():
        ours = student(Batch(torch.rand(1, 3, 50, 50)), size=(size, size))
        assert ours["a"].spatial.shape == (1, *grid, 16)


def test_a_student_of_one_size_refuses_others_by_name():
    with pytest.raises(ValueError, match="test_vit, built for 160 px, cannot look at 100 px"):
        student_grids("test_vit", 160, (160, 100))


def test_spectral_norms_leave_a_vit_as_it_is_and_fold_away():
    plain, spectral = tiny().eval(), tiny(spectral_norms=True).eval()
    weights = {k: v for k, v in plain.state_dict().items() if k.startswith("backbone")}
    back = spectral.without_spectral()
    assert set(weights) <= set(back.state_dict())
    seen = Batch(torch.rand(2, 3, 160, 160))
    for mine, theirs in zip(spectral.look(seen), back.look(seen), strict=True):
        torch.testing.assert_close(mine, theirs)
    again = copy.deepcopy(spectral).look(seen)  # a class that copies share is still whole
    torch.testing.assert_close(again.summary, spectral.look(seen).summary)
    assert spectral.backbone.blocks[0].attn.qkv.parametrizations
    assert plain.without_spectral() is plain
    with pytest.raises(ValueError, match="eradio_nano has no attention blocks of a ViT"):
        tiny("eradio_nano", spectral_norms=True)


@pytest.mark.slow
@pytest.mark.parametrize("option", ['vitdet={"window":2,"num_global":1}', "crop_positions=True"])
def test_windows_and_cropped_positions_are_options_of_a_radio_student(option):
    options = read_options((option, "depth=2", "embed_dim=32", "num_heads=2"))
    student = tiny("radio_vit_base_patch16", 64, options=options, dynamic=True)
    for size in (64, 96):
        ours = student(Batch(torch.rand(2, 3, 96, 96)), size=(size, size))
        assert ours["b"].spatial.shape == (2, size // 16, size // 16, 8)
