import json
import sys

import pytest
import timm
import torch
from torch import nn

from zoo.features import Batch, Features
from zoo.students.build import build_student
from zoo.students.export import export_student
from zoo.teachers.from_torch import IMAGENET_MEAN, IMAGENET_STD, from_module
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Frozen, Teacher, bf16_weights, fingerprint
from zoo.train.distill.setup import check_losses

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
        ("zoo:local-dir:runs/a/export@64", TeacherName("zoo", "local-dir:runs/a/export", None, 64)),
        ("hf:./random", TeacherName("hf", ".", "random")),
        ("hf:org/sam+neck@64", TeacherName("hf", "org/sam", None, 64, neck=True)),
        ("timm:samvit/a+neck", TeacherName("timm", "samvit", "a", neck=True)),
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
    ("text", "message"),
    [
        ("resnet18", "kind:name"),
        ("timn:resnet18", "Did you mean timm:resnet18"),
        ("timm:resnet81/random", "Did you mean resnet"),
        ("zoo:resnet18/random", "no zoo model"),
        ("torch:nowhere.make", "does not point at a function"),
        ("pretext:classifier", "has no weights of its own"),
        (
            "timm:test_vit//nowhere.safetensors",
            r"no weight file /nowhere\.safetensors.*hf download",
        ),
        ("timm:vit_base_patch16_224.dino", r"hf download timm/vit_base.*\.dino/FOLDER/model\.safe"),
        ("zoo:mambavision_t.in1k", r"hf download nvidia/.*in1k/FOLDER/mambavision_tiny_1k\.pth"),
        ("zoo:local-dir:/nowhere", r"/nowhere holds no timm checkpoint: config\.json is missing"),
        ("timm:test_vit/random@100", "do not tile 100 px; take @96 or @112"),
        ("timm:test_vit/random+neck", r"timm:test_vit has no neck"),
        ("rule:edges+neck@64", r"rule:edges has no neck"),
        ("opn_clip:ViT-B-32", "Did you mean open_clip:ViT-B-32"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_what_to_do(text, message):
    with pytest.raises(ValueError, match=message):
        open_teacher(text)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit3", "test_vit4", "test_convnext", "test_efficientnet"]
)
def test_a_timm_teacher_has_timms_own_features(name):
    teacher = open_teacher(f"timm:{name}/random")
    images = torch.rand(3, 3, *teacher.size)
    features = teacher(Batch(images))
    network = teacher.network
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        final = network.forward_features((images - mean) / std)
        torch.testing.assert_close(features.summary, network.forward_head(final, pre_logits=True))
        if final.ndim == 3:
            patches = final[:, network.num_prefix_tokens :]
        else:  # a map is pooled as the head does, whatever comes between
            (last,) = network.forward_intermediates(
                (images - mean) / std, indices=[-1], intermediates_only=True
            )
            patches = last.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.spatial.flatten(1, 2), patches)
    assert isinstance(teacher, Teacher)
    assert teacher.summary_dim == features.summary.shape[1]
    assert teacher.spatial_dim == patches.shape[2]
    assert teacher.grid == features.spatial.shape[1:3]


def test_a_zoo_teacher_has_the_models_own_features():
    """E-RADIO: its pooled vector, and the last map of `features_only`."""
    teacher = open_teacher("zoo:eradio_nano/random@64")
    images = torch.rand(2, 3, 64, 64)
    features = teacher(Batch(images))
    x = (images - teacher.mean) / teacher.std
    how = dict(features_only=True, out_indices=(-1,), img_size=64)  # which chooses the windows
    dense = timm.create_model("eradio_nano", **how).eval()
    dense.model.load_state_dict(teacher.network.state_dict(), strict=False)
    assert torch.equal(dense.model.stem[0].conv.weight, teacher.network.stem[0].conv.weight)
    with torch.no_grad():
        theirs = teacher.network.forward_features(x)
        summary = teacher.network.forward_head(theirs, pre_logits=True)
        spatial = dense(x)[-1].permute(0, 2, 3, 1)
    torch.testing.assert_close(features.summary, summary)
    torch.testing.assert_close(features.spatial, spatial)


def test_a_module_gets_normalised_images_and_its_output_is_the_features():
    network = nn.Conv2d(3, 5, 4, 4)
    teacher = from_module("conv", network, size=16)
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        theirs = network((images - mean) / std)
    torch.testing.assert_close(teacher(Batch(images)).spatial, theirs.permute(0, 2, 3, 1))


def test_an_exported_student_teaches_the_next_one(tmp_path):
    """At the size that it was trained at, positions and all, whatever its architecture."""
    student = build_student("test_vit", {"a": (8, 8)}, size=96).eval()
    batch = Batch(torch.rand(2, 3, 96, 96))
    export_student(student, tmp_path / "export", batch)
    for name in (f"zoo:local-dir:{tmp_path}/export", f"timm:local-dir:{tmp_path}/export"):
        teacher = open_teacher(name)
        assert (teacher.size, teacher.grid, teacher.license) == ((96, 96), (6, 6), None)
        for ours, theirs in zip(teacher(batch), student.features(batch), strict=True):
            torch.testing.assert_close(ours, theirs)
    plan = open_teacher(f"zoo:local-dir:{tmp_path}/export", device="meta")
    assert (plan.size, plan.grid, plan.summary_dim) == ((96, 96), (6, 6), 64)
    (tmp_path / "export" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"could not be loaded.*must hold .*model\.safetensors"):
        open_teacher(f"zoo:local-dir:{tmp_path}/export")


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
    ("output", "summary", "spatial", "message"),
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
def test_losses_that_a_teacher_has_no_target_for_are_refused(output, summary, spatial, message):
    class Module(nn.Module):
        def forward(self, x):
            return output(x)

    teacher = from_module("flat", Module(), size=16)
    with pytest.raises(ValueError, match=message):
        check_losses("flat", teacher, summary=summary, spatial=spatial)


def test_a_teacher_without_a_summary_teaches_its_map():
    teacher = from_module("map", nn.Identity(), size=16)
    check_losses("map", teacher, summary=1.0, spatial=1.0)


def test_bf16_weights_leave_the_norms_in_float32():
    network = bf16_weights(timm.create_model("test_efficientnet", num_classes=0))
    kinds = {True: set(), False: set()}
    for module in network.modules():
        for weight in module.parameters(recurse=False):
            kinds["Norm" in type(module).__name__].add(weight.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    assert {b.dtype for b in network.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("model", ["test_vit", "test_vit4", "test_efficientnet", "test_convnext"])
def test_a_teacher_with_bf16_weights_has_nearly_the_same_features(model):
    exact, converted = (open_teacher(f"timm:{model}/random") for _ in range(2))
    assert isinstance(converted, Frozen) and converted.to_bf16() is converted
    batch = Batch(torch.rand(2, 3, *exact.size))
    for ours, theirs in zip(converted(batch), exact(batch), strict=True):
        error = (ours.float() - theirs).square().mean() / theirs.var()
        assert error < 1e-3  # bf16 keeps eight bits: 2**-16 for a product, a few layers of them


def test_the_interpolation_is_timms_own():
    for model, interpolation in (("test_vit", "bicubic"), ("test_resnet", "bilinear")):
        assert open_teacher(f"timm:{model}/random").interpolation == interpolation


def test_a_library_that_is_not_installed_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install 'backbone-zoo\[teachers\]'"):
        open_teacher("open_clip:ViT-B-32/openai")


def test_a_sam_teaches_the_map_before_its_neck_as_wide_as_the_papers():
    """PHI-S (2410.01680, table 7) has SAM-H's means from -62 to 19: no layer norm leaves those."""
    wide = [
        open_teacher(f"timm:samvit_huge_patch16{neck}", device="meta").spatial_dim
        for neck in ("", "+neck")
    ]
    assert wide == [1280, 256]


def test_a_folder_says_its_own_size_even_where_timm_wrote_that_of_the_class(tmp_path):
    """As timm before 1.0.30 does."""
    sizes = dict(img_size=64, num_classes=0)
    model = timm.create_model("test_vit", **sizes)
    timm.models.save_for_hf(model, tmp_path, model_args=sizes, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 160, 160]
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = open_teacher(f"timm:local-dir:{tmp_path}")
    assert teacher.size == (64, 64)
    assert teacher(Batch(torch.rand(1, 3, 64, 64))).spatial.shape[1:3] == (4, 4)
