"""open_clip's towers, tiny, against the library's own way."""

import json
import logging

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher, fingerprint

open_clip = pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")

TOWERS = ["tiny-vit", "tiny-clipa", "tiny-sigmoid", "tiny-resnet", "tiny-coca"]


def photos(side: int) -> Tensor:
    coarse = torch.randint(0, 256, (2, 3, 4, 4)).float()  # blocks: noise would average out
    return torch.nn.functional.interpolate(coarse, (side, side)).to(torch.uint8)


def saved_model(name: str, folder) -> tuple[torch.nn.Module, str]:
    model = open_clip.create_model(name)
    with torch.no_grad():  # leave no layer at an initial value that hides what it does
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    torch.save(model.state_dict(), folder / "weights.pt")
    return model.eval(), str(folder / "weights.pt")


def as_documented(model: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's own transform of PIL images, `encode_image`, and the tower's tokens."""
    prepared = open_clip.get_model_preprocess_cfg(model)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**prepared), is_train=False
    )
    shown = [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    x = torch.stack(shown)
    maps = []
    tower = model.visual
    last = (
        tower.transformer.resblocks[-1]
        if hasattr(tower, "transformer")
        else tower.trunk.blocks[-1]
        if hasattr(tower, "trunk")
        else tower.layer4
    )
    hook = last.register_forward_hook(lambda _, args, out: maps.append(out))
    with torch.no_grad():
        summary = model.encode_image(x)
        hook.remove()
        spatial = maps[0]
        if spatial.ndim == 3:
            if getattr(tower, "attn_pool", None) is None:
                spatial = (
                    tower.trunk.norm(spatial) if hasattr(tower, "trunk") else tower.ln_post(spatial)
                )
            prefix = tower.trunk.num_prefix_tokens if hasattr(tower, "trunk") else 1
            spatial = spatial[:, prefix:]
            side = int(spatial.shape[1] ** 0.5)
            spatial = spatial.unflatten(1, (side, side))
        else:
            spatial = spatial.permute(0, 2, 3, 1)
    return summary, spatial


@pytest.mark.parametrize("name", TOWERS)
def test_a_teacher_has_the_features_of_the_librarys_own_way(name, tiny, tmp_path):
    model, weights = saved_model(name, tmp_path)
    teacher = open_teacher(f"open_clip:{name}/{weights}")
    side = tiny[name]["vision_cfg"]["image_size"]
    images = photos(side)
    features = teacher(Batch(images))
    summary, spatial = as_documented(model, images)
    if name == "tiny-coca":  # its encode_image always normalises
        features = features._replace(
            summary=torch.nn.functional.normalize(features.summary, dim=-1)
        )
    assert spatial.std() > 0.02 and (spatial[0] - spatial[1]).std() > 0.002
    torch.testing.assert_close(features.summary, summary, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features.spatial, spatial, atol=1e-5, rtol=1e-4)
    assert isinstance(teacher, Teacher)
    assert teacher.size == (side, side) and teacher.interpolation == "bicubic"
    assert teacher.summary_dim == tiny[name]["embed_dim"]
    assert teacher.grid == spatial.shape[1:3] and teacher.spatial_dim == spatial.shape[-1]


@pytest.mark.parametrize("name", TOWERS)
def test_on_the_meta_device_the_same_shapes_are_known_without_weights(name, tiny):
    teacher = open_teacher(f"open_clip:{name}/random")
    plan = open_teacher(f"open_clip:{name}", device="meta")
    assert all(p.is_meta for p in plan.parameters())
    for fact in ("size", "summary_dim", "spatial_dim", "grid"):
        assert getattr(plan, fact) == getattr(teacher, fact)


def test_another_resolution_interpolates_the_positions(tiny, tmp_path):
    _, weights = saved_model("tiny-vit", tmp_path)
    teacher = open_teacher(f"open_clip:tiny-vit/{weights}@48")
    model = open_clip.create_model("tiny-vit", pretrained=weights, force_image_size=48).eval()
    images = photos(48)
    features = teacher(Batch(images))
    summary, spatial = as_documented(model, images)
    torch.testing.assert_close(features.summary, summary, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features.spatial, spatial, atol=1e-5, rtol=1e-4)
    assert teacher.grid == (6, 6)


def test_a_timm_tower_takes_another_resolution(tiny):
    teacher = open_teacher("open_clip:tiny-sigmoid/random@96")
    assert teacher.size == (96, 96) and teacher.grid == (6, 6)


def test_the_random_teacher_is_the_same_each_time_and_logs_nothing(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        first, second = (open_teacher("open_clip:tiny-vit/random") for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    assert not caplog.records


@pytest.mark.parametrize(("name", "size"), [("tiny-vit", 48), ("tiny-sigmoid", 96)])
def test_at_another_size_the_same_weights_answer_as_opened_there(name, size, tiny, tmp_path):
    _, weights = saved_model(name, tmp_path)
    teacher = open_teacher(f"open_clip:{name}/{weights}")
    other = teacher.at_size((size, size))
    images = Batch(photos(size))
    alone = open_teacher(f"open_clip:{name}/{weights}@{size}")
    for found, expected in zip(other(images), alone(images), strict=True):
        torch.testing.assert_close(found, expected)
    ours, theirs = dict(other.named_parameters()), dict(teacher.named_parameters())
    new = [key for key, value in ours.items() if value.data_ptr() != theirs[key].data_ptr()]
    assert len(new) == 1 and "pos" in new[0]


def test_the_text_tower_does_not_stay_in_memory(tiny):
    teacher = open_teacher("open_clip:tiny-vit/random")
    assert not [key for key in teacher.state_dict() if "text" in key or "token_embedding" in key]


def test_a_folder_in_open_clips_form_brings_its_preprocessing_and_licence(tiny, tmp_path):
    model, _ = saved_model("tiny-vit", tmp_path)
    torch.save(model.state_dict(), tmp_path / "open_clip_model.pth")
    (tmp_path / "weights.pt").unlink()
    prepared = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation="bilinear")
    config = dict(model_cfg=tiny["tiny-vit"], preprocess_cfg=prepared)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    teacher = open_teacher(f"open_clip:local-dir:{tmp_path}")
    assert teacher.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (teacher.interpolation, teacher.license) == ("bilinear", "mit")
    torch.testing.assert_close(teacher.network.proj, model.visual.proj)
    assert open_teacher(f"open_clip:local-dir:{tmp_path}/random").license is None
    (tmp_path / "open_clip_model.pth").unlink()
    with pytest.raises(ValueError, match=r"could not be loaded: Required pretrained weights"):
        open_teacher(f"open_clip:local-dir:{tmp_path}")


@pytest.mark.slow  # a base model on the meta device, several times
def test_a_tag_decides_preprocessing_and_activation_before_anything_is_downloaded():
    clip = open_teacher("open_clip:ViT-B-32/openai", device="meta")
    assert type(clip.network.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert (clip.grid, clip.summary_dim, clip.spatial_dim) == ((7, 7), 512, 768)
    assert "QuickGELU" not in str(open_teacher("open_clip:ViT-B-32", device="meta").network)
    shared = open_teacher("open_clip:ViT-B-16-SigLIP/random")
    assert shared.mean.flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33/openai", r"Did you mean ViT-B-32"),
        ("tiny-vit", r"needs weights: a file; open_clip has none.*tiny-vit/PATH"),
        ("ViT-B-16-SigLIP", r"needs weights: one of webli.*open_clip:ViT-B-16-SigLIP/webli"),
        ("ViT-B-32/opnai", r"no weights 'opnai'.*Its tags are openai, laion"),
        ("ViT-B-32/openai", r"HF_HUB_OFFLINE is set.*hf download timm/.*local-dir:FOLDER"),
        ("local-dir:/nowhere", r"could not be opened.*open_clip_config\.json"),
        ("tiny-vit/random@36", r"do not tile 36 px; take @32 or @40"),
        ("tiny-sigmoid/random@40", r"patches of 16 px, which do not tile 40 px; take @32 or @48"),
        ("tiny-resnet/random@96", r"takes 64 px and no other size"),
    ],
)
def test_what_cannot_be_opened_says_what_to_do(name, message, tiny):
    with pytest.raises(ValueError, match=message):
        open_teacher(f"open_clip:{name}")


def test_a_damaged_or_foreign_weight_file_is_refused(tiny, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="could not be loaded"):
        open_teacher(f"open_clip:tiny-vit/{path}")
    torch.save(open_clip.create_model("tiny-resnet").state_dict(), path)
    with pytest.raises(ValueError, match="could not be loaded"):
        open_teacher(f"open_clip:tiny-vit/{path}")
