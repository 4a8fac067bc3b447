"""Every kind of vision model, tiny and saved to a folder, against the library's own way."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.features import Batch
from zoo.teachers.from_transformers import to_map
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher, fingerprint

hf = pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(SMALL, image_size=32, patch_size=8)
TEXT = dict(
    SMALL, vocab_size=99, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1
)
NORM = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
SAM = dict(
    hidden_size=32,
    output_channels=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=64,
    patch_size=8,
    mlp_dim=32,
    window_size=3,
    global_attn_indexes=[1],
    num_pos_feats=8,
)
HIERA = dict(
    hidden_size=8,
    num_attention_heads=1,
    blocks_per_stage=[1, 1, 2, 1],
    embed_dim_per_stage=[8, 16, 32, 64],
    num_attention_heads_per_stage=[1, 1, 1, 1],
    window_size_per_stage=[2, 2, 2, 2],
    global_attention_blocks=[3],
    image_size=[128, 128],
    window_positional_embedding_background_size=[3, 3],
)


def cropped(side: int) -> dict[str, Any]:
    return dict(NORM, size=dict(shortest_edge=side + 9), crop_size=dict(height=side, width=side))


def shake(model: torch.nn.Module) -> None:
    """Leave no layer at an initial value that hides what it does (zeros, ones, 1e-6)."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))


def square(side: int) -> dict[str, Any]:
    return dict(size=dict(height=side, width=side))


def grid(tokens: Tensor, prefix: int, side: int) -> Tensor:
    return tokens[:, prefix:].reshape(len(tokens), side, side, -1)


@dataclass
class Case:
    """A tiny model, its processor, and how its documentation reads summary and map."""

    model: type
    config: Callable[[], Any]
    processor: Callable[[], Any]
    size: int
    read: Callable[[Any, dict], tuple[Tensor | None, Tensor]]

    def save(self, folder) -> str:
        torch.manual_seed(7)
        model = self.model(self.config())
        shake(model)
        model.save_pretrained(folder)
        self.processor().save_pretrained(folder)
        return str(folder)


def read_two_towers(model, inputs):
    out = model.get_image_features(**inputs)
    return out.pooler_output, out.last_hidden_state


def clip_like(prefix, read=read_two_towers):
    def of(model, inputs):
        summary, tokens = read(model, inputs)
        return summary, grid(tokens, prefix, 4)

    return of


def read_pooled(model, inputs):
    out = model(**inputs)
    return out.pooler_output, out.last_hidden_state


CASES = {
    "clip": Case(
        hf.CLIPModel,
        lambda: hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12),
        lambda: hf.CLIPImageProcessor(**cropped(32)), 32, clip_like(1),
    ),
    "clip_vision": Case(
        hf.CLIPVisionModel, lambda: hf.CLIPVisionConfig(**VISION),
        lambda: hf.CLIPImageProcessor(**cropped(32)), 32, clip_like(1, read_pooled),
    ),
    "clip_projected": Case(
        hf.CLIPVisionModelWithProjection, lambda: hf.CLIPVisionConfig(**VISION, projection_dim=12),
        lambda: hf.CLIPImageProcessor(**cropped(32)), 32,
        clip_like(1, lambda m, i: (m(**i).image_embeds, m(**i).last_hidden_state)),
    ),
    "siglip": Case(
        hf.SiglipModel, lambda: hf.SiglipConfig(text_config=TEXT, vision_config=VISION),
        lambda: hf.SiglipImageProcessor(**square(32)), 32, clip_like(0),
    ),
    "siglip_vision": Case(
        hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**VISION),
        lambda: hf.SiglipImageProcessor(**square(32)), 32, clip_like(0, read_pooled),
    ),
    "siglip2": Case(
        hf.Siglip2Model,
        lambda: hf.Siglip2Config(
            text_config=TEXT, vision_config=dict(SMALL, patch_size=8, num_patches=9)
        ),
        lambda: hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), 32, clip_like(0),
    ),
    "dinov2_registers": Case(
        hf.Dinov2WithRegistersModel,
        lambda: hf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3),
        lambda: hf.BitImageProcessor(**cropped(48)), 48,
        lambda m, i: (m(**i).pooler_output, grid(m(**i).last_hidden_state, 4, 6)),
    ),
    "dinov3": Case(
        hf.DINOv3ViTModel, lambda: hf.DINOv3ViTConfig(**VISION, num_register_tokens=4),
        lambda: hf.DINOv3ViTImageProcessor(**square(32)), 32, clip_like(5, read_pooled),
    ),
    "dinov3_convnext": Case(
        hf.DINOv3ConvNextModel,
        lambda: hf.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        lambda: hf.DINOv3ViTImageProcessor(**square(64)), 64,
        lambda m, i: (m(**i).pooler_output, grid(m(**i).last_hidden_state, 1, 2)),
    ),
    "sam": Case(
        hf.SamModel, lambda: hf.SamConfig(vision_config=SAM),
        lambda: hf.SamImageProcessor(
            size=dict(longest_edge=64), pad_size=dict(height=64, width=64)
        ),
        64, lambda m, i: (
            None,
            m.vision_encoder(i["pixel_values"], output_hidden_states=True).hidden_states[-1],
        ),
    ),
    "sam2": Case(
        hf.Sam2Model,
        lambda: hf.Sam2Config(
            vision_config=hf.Sam2VisionConfig(
                backbone_config=hf.Sam2HieraDetConfig(**HIERA), fpn_hidden_size=24,
                backbone_channel_list=[64, 32, 16, 8],
                backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
            ),
            prompt_encoder_config=dict(hidden_size=24, image_size=128, patch_size=16),
            mask_decoder_config=dict(hidden_size=24),
        ),
        lambda: hf.Sam2ImageProcessor(**square(128)), 128,
        lambda m, i: (
            None,
            m.vision_encoder(i["pixel_values"]).fpn_hidden_states[-1].permute(0, 2, 3, 1),
        ),
    ),
    "sam3": Case(
        hf.Sam3VisionModel,
        lambda: hf.Sam3VisionConfig(
            backbone_config=hf.Sam3ViTConfig(
                **SMALL, image_size=64, patch_size=8, pretrain_image_size=32, window_size=4,
                global_attn_indexes=[1],
            ),
            fpn_hidden_size=16, backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        ),
        lambda: hf.Sam3ImageProcessor(**square(64)), 64,
        lambda m, i: (None, grid(m(i["pixel_values"]).last_hidden_state, 0, 8)),
    ),
    "radio": Case(
        hf.RadioModel,
        lambda: hf.RadioConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
            image_size=32, max_img_size=64,
        ),
        lambda: hf.CLIPImageProcessor(
            do_normalize=False, size=dict(shortest_edge=32),
            crop_size=dict(height=32, width=32),
        ),
        32, clip_like(0, lambda m, i: (m(**i).summary, m(**i).features)),
    ),
    "aimv2": Case(
        hf.Aimv2Model,
        lambda: hf.Aimv2Config(text_config=TEXT, vision_config=VISION, projection_dim=12),
        lambda: hf.CLIPImageProcessor(**cropped(32)), 32, clip_like(0),
    ),
    "depth_anything": Case(
        hf.DepthAnythingForDepthEstimation,
        lambda: hf.DepthAnythingConfig(
            backbone_config=hf.Dinov2Config(
                **VISION, out_indices=[1, 2], reshape_hidden_states=False
            ),
            patch_size=8, reassemble_hidden_size=32, reassemble_factors=[2, 1],
            neck_hidden_sizes=[8, 8], fusion_hidden_size=8,
        ),
        lambda: hf.DPTImageProcessor(**square(32)), 32,
        lambda m, i: (None, grid(m.backbone(**i).feature_maps[-1], 1, 4)),
    ),
    "swin": Case(
        hf.SwinModel,
        lambda: hf.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32,
            patch_size=4,
        ),
        lambda: hf.ViTImageProcessor(**square(32)), 32, clip_like(0, read_pooled),
    ),
    "convnext": Case(
        hf.ConvNextModel,
        lambda: hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        lambda: hf.ConvNextImageProcessor(size=dict(shortest_edge=64), crop_pct=1.0), 64,
        lambda m, i: (m(**i).pooler_output, m(**i).last_hidden_state.permute(0, 2, 3, 1)),
    ),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Save the tiny model of a case; its name as a teacher comes back."""
    return lambda kind: "hf:" + CASES[kind].save(tmp_path / kind)


def photos(side: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)


def as_documented(kind: str, folder: str, images: Tensor, **how) -> tuple[Tensor | None, Tensor]:
    """Open processor and model with the library alone and run them on PIL images."""
    case = CASES[kind]
    processor = case.processor()
    if kind in ("clip", "clip_vision", "clip_projected", "aimv2", "dinov2_registers"):
        # images come at their final size here: the crop's margin is the data pipeline's business
        processor.size = dict(shortest_edge=images.shape[-1])
        processor.crop_size = dict(height=images.shape[-2], width=images.shape[-1])
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    inputs = processor(images=shown, return_tensors="pt")
    if "pixel_values" in inputs and kind.startswith("sam"):
        inputs = dict(pixel_values=inputs["pixel_values"])
    model = case.model.from_pretrained(folder).eval()
    with torch.no_grad():
        return case.read(model, dict(inputs, **how))


@pytest.mark.parametrize("kind", CASES)
def test_a_teacher_has_the_features_of_the_librarys_own_way(kind, saved):
    name = saved(kind)
    teacher = open_teacher(name)
    images = photos(CASES[kind].size)
    features = teacher(Batch(images))
    summary, spatial = as_documented(kind, name.removeprefix("hf:"), images)
    assert spatial.std() > 0.02 and (spatial[0] - spatial[1]).std() > 0.02
    # the library divides by 255 and by the deviation at once, a rounding apart
    torch.testing.assert_close(features.spatial, spatial, atol=1e-5, rtol=1e-4)
    if summary is None:
        assert features.summary is None
    else:
        torch.testing.assert_close(features.summary, summary.flatten(1), atol=1e-5, rtol=1e-4)
    assert isinstance(teacher, Teacher)
    assert teacher.size == (CASES[kind].size,) * 2
    assert teacher.grid == spatial.shape[1:3] and teacher.spatial_dim == spatial.shape[-1]


def test_a_sam_has_its_necks_map_if_that_is_asked_for(saved):
    name, images = saved("sam"), photos(64)
    x = Batch(images).at((64, 64))
    with torch.no_grad():
        model = hf.SamModel.from_pretrained(name.removeprefix("hf:")).eval()
        behind = open_teacher(f"{name}+neck")
        theirs = model.get_image_embeddings((x - behind.mean) / behind.std)
    torch.testing.assert_close(behind(Batch(images)).spatial, theirs.permute(0, 2, 3, 1))
    assert (open_teacher(name).spatial_dim, behind.spatial_dim) == (32, 16)
    with pytest.raises(ValueError, match=r"has no neck.*leave out \+neck"):
        open_teacher(f"{saved('dinov3')}+neck")


@pytest.mark.parametrize("kind", CASES)
def test_on_the_meta_device_the_same_shapes_are_known_without_weights(kind, saved, tmp_path):
    name = saved(kind)
    teacher = open_teacher(name)
    for weights in (tmp_path / kind).glob("*.safetensors"):
        weights.unlink()
    plan = open_teacher(name, device="meta")
    assert all(p.is_meta for p in plan.parameters())
    for fact in ("size", "summary_dim", "spatial_dim", "grid"):
        assert getattr(plan, fact) == getattr(teacher, fact)


@pytest.mark.parametrize("kind", ["clip", "clip_projected", "siglip"])
def test_another_resolution_interpolates_the_positions(kind, saved):
    name = saved(kind)
    case, images = CASES[kind], photos(48)
    ours = open_teacher(f"{name}@48")(Batch(images))
    model = case.model.from_pretrained(name.removeprefix("hf:")).eval()
    processor = case.processor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    forward = getattr(model, "get_image_features", model)
    with torch.no_grad():
        theirs = forward((images / 255 - mean) / std, interpolate_pos_encoding=True)
    prefix = 0 if kind == "siglip" else 1
    expected = grid(theirs.last_hidden_state, prefix, 6)
    torch.testing.assert_close(ours.spatial, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2_registers", "dinov3", "siglip2", "radio", "convnext"])
def test_models_of_any_size_take_any_resolution(kind, saved):
    teacher = open_teacher(f"{saved(kind)}@96")
    assert teacher.size == (96, 96)
    assert teacher.grid == ((3, 3) if kind == "convnext" else (12, 12))


@pytest.mark.parametrize("kind", ["dinov2_registers", "dinov3", "clip", "siglip2"])
def test_at_another_size_the_same_network_answers_as_opened_there(kind, saved):
    name, side = saved(kind), 96
    teacher = open_teacher(name)
    other = teacher.at_size((side, side))
    assert other.network is teacher.network and teacher.size != other.size
    images = Batch(photos(side))
    alone = open_teacher(f"{name}@{side}")
    torch.testing.assert_close(other(images).spatial, alone(images).spatial)
    assert other.grid == alone.grid


def test_the_interpolation_is_that_of_the_image_processor(saved):
    images = photos(70)
    for kind, interpolation in (("dinov3", "bilinear"), ("siglip", "bicubic")):
        teacher = open_teacher(saved(kind))
        assert teacher.interpolation == interpolation
        batch = Batch(images)
        x = (batch.at((32, 32), interpolation) - teacher.mean) / teacher.std
        torch.testing.assert_close(teacher(batch).spatial, teacher.features(x).spatial)


def test_the_text_tower_does_not_stay_in_memory(saved):
    teacher = open_teacher(saved("clip"))
    assert not [key for key in teacher.state_dict() if "text" in key]


def test_the_random_teacher_needs_no_weights_and_is_the_same_each_time(saved, tmp_path):
    name = saved("dinov3")
    for weights in (tmp_path / "dinov3").glob("*.safetensors"):
        weights.unlink()
    first, second = (open_teacher(f"{name}/random") for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    with pytest.raises(ValueError, match=r"could not be loaded: .*model\.safetensors"):
        open_teacher(name)


def test_without_the_poolers_weights_the_class_token_is_the_summary(tmp_path):
    """A classifier's checkpoint has none; transformers would draw them at random."""
    config = hf.ViTConfig(**VISION)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path)
    hf.ViTImageProcessor(**square(32)).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    features = open_teacher(f"hf:{tmp_path}")(Batch(images))
    model = hf.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = model((images - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(features.summary, tokens[:, 0])
    torch.testing.assert_close(features.spatial.flatten(1, 2), tokens[:, 1:])


def test_weights_of_another_model_are_refused(saved, tmp_path):
    name = saved("dinov3")
    saved("swin")
    (tmp_path / "swin" / "model.safetensors").replace(tmp_path / "dinov3" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack \d+ tensors of DINOv3ViTModel"):
        open_teacher(name)


def test_weights_in_half_precision_are_loaded_as_float32(saved, tmp_path):
    name = saved("dinov3")
    case = CASES["dinov3"]
    case.model(case.config()).to(torch.bfloat16).save_pretrained(tmp_path / "dinov3")
    assert {p.dtype for p in open_teacher(name).parameters()} == {torch.float32}


def test_the_licence_stands_in_the_model_card(saved, tmp_path):
    name = saved("dinov3")
    assert open_teacher(name).license is None
    card = tmp_path / "dinov3" / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\nA model.\n")
    assert open_teacher(name).license == "dinov3-license"
    card.write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    assert open_teacher(name).license == "apache-2.0"


@pytest.mark.parametrize(
    ("kind", "resolution", "message"),
    [
        ("sam", 96, r"cannot look at 96x96 px: .*64\*64.* Leave out @96"),
        ("aimv2", 64, r"cannot look at 64x64 px"),
        ("clip", 36, r"patches of 8 px, which do not tile 36 px; take @32 or @40"),
        ("dinov2_registers", 5, r"take @8"),
    ],
)
def test_a_resolution_that_it_cannot_take_is_refused(kind, resolution, message, saved):
    with pytest.raises(ValueError, match=message):
        open_teacher(f"{saved(kind)}@{resolution}")


def test_what_is_not_there_is_reported_with_the_files_to_put(saved, tmp_path):
    with pytest.raises(ValueError, match=r"hf download nobody/nothing .*hf:FOLDER.*config\.json"):
        open_teacher("hf:nobody/nothing")
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set"):
        open_teacher("hf:nobody/nothing", device="meta")
    with pytest.raises(ValueError, match=r"There is no folder /nowhere/at/all"):
        open_teacher("hf:/nowhere/at/all")
    name = saved("dinov3")
    for file in (tmp_path / "dinov3").glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json beside config\.json"):
        open_teacher(name)


def test_a_language_model_is_no_teacher(tmp_path):
    config = hf.LlamaConfig(**SMALL, vocab_size=99, bos_token_id=0, eos_token_id=1)
    config.save_pretrained(tmp_path)
    hf.ViTImageProcessor(**square(32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaModel, which is not an image encoder"):
        open_teacher(f"hf:{tmp_path}")


def test_a_type_that_transformers_does_not_know_is_refused_without_running_its_code(tmp_path):
    config = dict(model_type="homemade", auto_map=dict(AutoConfig="code.Config"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ValueError, match=r"could not be opened"):
        open_teacher(f"hf:{tmp_path}")


def test_tokens_that_are_no_patches_are_refused():
    """YOLOS puts its detection tokens behind the patches, where a map would swallow them."""
    config = hf.YolosConfig(**dict(VISION, image_size=[32, 32]))
    with pytest.raises(ValueError, match=r"its 26 tokens are not those of 8 px patches"):
        to_map(torch.zeros(1, 26, 5), (32, 32), config)


def test_a_map_keeps_its_rows_and_columns():
    config = hf.CLIPVisionConfig(**VISION)
    tokens = torch.arange(1.0, 9).view(1, 8, 1)
    prefix, spatial = to_map(torch.cat([torch.zeros(1, 1, 1), tokens], 1), (16, 32), config)
    assert prefix is not None and prefix.shape == (1, 1, 1)
    assert spatial[0, :, :, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    channels_first = spatial.permute(0, 3, 1, 2).expand(1, 3, 2, 4)
    assert to_map(channels_first, (16, 32), config)[1].shape == (1, 2, 4, 3)
    assert to_map(spatial.expand(1, 2, 4, 3), (16, 32), config)[1].shape == (1, 2, 4, 3)
