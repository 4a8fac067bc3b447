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
from zoo.students.student import build_student

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


def test_a_backbone_takes_further_sizes_and_the_recipe_remembers_them():
    student = build_student("vit_tiny_patch16_224", {}, size=32, options=dict(depth=2))
    assert len(student.backbone.blocks) == 2
    name, kwargs = student.recipe
    again = timm.create_model(name, **kwargs)
    again.load_state_dict(student.backbone.state_dict())
