import pytest
import timm
import torch
from torch import nn

from zoo.features import Batch, Features
from zoo.teachers import Teacher, TeacherName, open_teacher
from zoo.teachers.from_torch import from_module
from zoo.teachers.teacher import fingerprint

VIT = "timm:test_vit/random"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:resnet18", TeacherName("timm", "resnet18")),
        ("timm:vit.in1k@378", TeacherName("timm", "vit.in1k", None, 378)),
        ("timm:vit/a/b.safetensors@96", TeacherName("timm", "vit", "a/b.safetensors", 96)),
        ("torch:pkg.mod.make", TeacherName("torch", "pkg.mod.make")),
    ],
)
def test_a_name_is_kind_name_weights_and_resolution(text, expected):
    assert TeacherName.parse(text) == expected


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
