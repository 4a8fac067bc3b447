import sys

import pytest
import timm
import torch
from torch import nn

from zoo.features import Batch, Features
from zoo.teachers import Teacher, TeacherName, open_teacher
from zoo.teachers.from_torch import from_module
from zoo.teachers.teacher import Frozen, check_losses, fingerprint, half_weights

VIT = "timm:test_vit/random"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:resnet18", TeacherName("timm", "resnet18")),
        ("timm:vit.in1k@378", TeacherName("timm", "vit.in1k", None, 378)),
        ("timm:vit/a/b.safetensors@96", TeacherName("timm", "vit", "a/b.safetensors", 96)),
        ("torch:pkg.mod.make", TeacherName("torch", "pkg.mod.make")),
        ("open_clip:ViT-B-32/openai@256", TeacherName("open_clip", "ViT-B-32", "openai", 256)),
        ("open_clip:ViT-B-32/a/b.pt", TeacherName("open_clip", "ViT-B-32", "a/b.pt")),
        ("open_clip:local-dir:/a/b/random", TeacherName("open_clip", "local-dir:/a/b", "random")),
        ("hf:org/name", TeacherName("hf", "org/name")),
        ("hf:org/name@518", TeacherName("hf", "org/name", None, 518)),
        ("hf:org/name/random@64", TeacherName("hf", "org/name", "random", 64)),
        ("hf:/a/folder/deep", TeacherName("hf", "/a/folder/deep")),
        ("hf:./random", TeacherName("hf", ".", "random")),
    ],
)
def test_a_name_is_kind_name_weights_and_resolution(text, expected):
    assert TeacherName.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("timm:vit.in1k/a/b.pt@96", "vit_in1k"),
        ("hf:facebook/dinov2-base@224", "dinov2-base"),
        ("hf:/a/folder/deep/random", "deep"),
        ("open_clip:local-dir:/a/clip", "clip"),
        ("torch:pkg.mod.make", "make"),
    ],
)
def test_a_label_is_the_last_part_of_a_name(text, label):
    assert TeacherName.parse(text).label == label


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resnet18", "kind:name"),
        ("timn:resnet18", "Did you mean timm:resnet18"),
        ("timm:resnet81/random", "Did you mean resnet"),
        ("zoo:resnet18/random", "no zoo model"),
        ("torch:nowhere.make", "does not point at a function"),
        ("pretext:classifier", "has no weights of its own"),
        ("timm:test_vit//nowhere.safetensors", "could not be loaded"),
        ("timm:test_vit/random@100", "do not tile 100 px; take @96 or @112"),
        ("opn_clip:ViT-B-32", "Did you mean open_clip:ViT-B-32"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(text, told):
    with pytest.raises(ValueError, match=told):
        open_teacher(text)


def test_a_timm_teacher_says_what_timm_says():
    teacher = open_teacher(VIT)
    images = torch.rand(3, 3, *teacher.size)
    seen = teacher(Batch(images))
    network = teacher.network
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        tokens = network.forward_features((images - mean) / std)
        torch.testing.assert_close(seen.summary, network.forward_head(tokens, pre_logits=True))
    patches = tokens[:, network.num_prefix_tokens :]
    torch.testing.assert_close(seen.spatial.flatten(1, 2), patches)
    assert isinstance(teacher, Teacher)
    assert (teacher.summary_dim, teacher.spatial_dim) == (64, 64)
    assert teacher.grid == seen.spatial.shape[1:3]


def test_a_teacher_takes_bytes_of_any_size_and_another_resolution():
    teacher = open_teacher(f"{VIT}@96")
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    assert teacher.size == (96, 96) and teacher.grid == (6, 6)
    assert teacher(Batch(images)).spatial.shape == (2, 6, 6, 64)


def test_a_teacher_is_never_trained():
    teacher = open_teacher(VIT).train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_random_teacher_is_the_same_each_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prints = {fingerprint(open_teacher(VIT)) for _ in range(2)}
    assert len(prints) == 1 and torch.equal(before, torch.get_rng_state())
    assert fingerprint(open_teacher("timm:test_vit2/random")) not in prints


def test_weights_come_from_a_file(tmp_path):
    network = timm.create_model("test_vit", num_classes=10)
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path)
    teacher = open_teacher(f"timm:test_vit/{path}")
    torch.testing.assert_close(teacher.network.norm.weight, network.norm.weight)
    torch.testing.assert_close(
        teacher.network.patch_embed.proj.weight, network.patch_embed.proj.weight
    )


def test_on_the_meta_device_only_the_shapes_are_known():
    teacher = open_teacher("timm:vit_large_patch16_224", device="meta")
    assert teacher.grid == (14, 14) and teacher.spatial_dim == 1024
    assert all(p.is_meta for p in teacher.parameters())


@pytest.mark.parametrize(
    ("output", "summary_dim", "spatial_dim"),
    [
        (lambda x: x.mean((2, 3)), 3, None),
        (lambda x: x[:, :, ::8, ::8], None, 3),
        (lambda x: dict(summary=x.mean((2, 3))), 3, None),
        (lambda x: Features(None, x.permute(0, 2, 3, 1)), None, 3),
    ],
)
def test_any_module_can_teach(output, summary_dim, spatial_dim):
    class Rule(nn.Module):
        def forward(self, x):
            return output(x)

    teacher = from_module("rule", Rule(), size=16)
    assert (teacher.summary_dim, teacher.spatial_dim) == (summary_dim, spatial_dim)


def test_a_module_that_returns_something_else_is_told_what_to_return():
    class Odd(nn.Module):
        def forward(self, x):
            return x.flatten()

    with pytest.raises(ValueError, match=r"should return Features"):
        from_module("odd", Odd(), size=16)


@pytest.mark.parametrize(
    ("output", "summary", "spatial", "told"),
    [
        (
            lambda x: x.mean((2, 3)),
            1.0,
            1.0,
            "no spatial output, .* weight 1. Write flat,spatial=0",
        ),
        (lambda x: x, 1.0, 0.0, "nothing can be learnt"),
        (lambda x: x.mean((2, 3)), 0.0, 0.0, "nothing can be learnt"),
    ],
)
def test_losses_that_a_teacher_has_no_target_for_are_refused(output, summary, spatial, told):
    class Module(nn.Module):
        def forward(self, x):
            return output(x)

    teacher = from_module("flat", Module(), size=16)
    with pytest.raises(ValueError, match=told):
        check_losses("flat", teacher, summary=summary, spatial=spatial)


def test_a_teacher_without_a_summary_teaches_its_map():
    teacher = from_module("map", nn.Identity(), size=16)
    check_losses("map", teacher, summary=1.0, spatial=1.0)


def test_half_weights_leave_the_norms_in_float32():
    network = half_weights(timm.create_model("test_efficientnet", num_classes=0))
    kinds = {True: set(), False: set()}
    for module in network.modules():
        for weight in module.parameters(recurse=False):
            kinds["Norm" in type(module).__name__].add(weight.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    assert {b.dtype for b in network.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("model", ["test_vit", "test_vit4", "test_efficientnet", "test_convnext"])
def test_a_halved_teacher_says_nearly_the_same(model):
    exact, halved = (open_teacher(f"timm:{model}/random") for _ in range(2))
    assert isinstance(halved, Frozen) and halved.halve() is halved
    batch = Batch(torch.rand(2, 3, *exact.size))
    for ours, theirs in zip(halved(batch), exact(batch), strict=True):
        error = (ours.float() - theirs).square().mean() / theirs.var()
        assert error < 1e-3  # bf16 keeps eight bits: 2**-16 for a product, a few layers of them


def test_the_interpolation_is_timms_own():
    for model, interpolation in (("test_vit", "bicubic"), ("test_resnet", "bilinear")):
        assert open_teacher(f"timm:{model}/random").interpolation == interpolation


def test_a_library_that_is_not_installed_is_told_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install 'backbone-zoo\[teachers\]'"):
        open_teacher("open_clip:ViT-B-32/openai")
