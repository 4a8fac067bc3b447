"""Zero-shot classifiers against the libraries' own way of building them."""

import json

import pytest
import torch
import torch.nn.functional as F

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.teachers.text import BATCH, text_classifier

open_clip = pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
hf = pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")

NAMES = ("cat", "dog", "red car")
TEMPLATES = ("a photo of a {}.", "the {}")
MODELS = dict(clip=hf.CLIPModel, siglip=hf.SiglipModel)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(SMALL, image_size=32, patch_size=8)
TEXT = dict(
    SMALL, vocab_size=12, max_position_embeddings=10, bos_token_id=0, eos_token_id=1, pad_token_id=0
)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-sigmoid", "tiny-coca"])
def test_the_classifier_of_open_clip_is_the_one_that_it_builds_itself(name, tiny, tmp_path):
    model = open_clip.create_model(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    teacher = open_teacher(f"open_clip:{name}/{tmp_path / 'weights.pt'}")
    ours = text_classifier(teacher, NAMES, TEMPLATES)
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("ViT-B-32", context_length=16), NAMES, TEMPLATES
    )
    torch.testing.assert_close(ours, theirs.T)
    assert ours.shape == (3, teacher.summary_dim)


def test_a_random_teachers_text_tower_is_of_the_same_draws(tiny):
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-vit").eval()
    teacher = open_teacher("open_clip:tiny-vit/random")
    torch.testing.assert_close(teacher.network.proj, model.visual.proj)
    ours = text_classifier(teacher, NAMES, TEMPLATES)
    theirs = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("tiny-vit"), NAMES, TEMPLATES
    )
    torch.testing.assert_close(ours, theirs.T)


def saved(folder, model, processor, words):
    torch.manual_seed(3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    words.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture
def clip(tmp_path, words):
    config = hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    processor = hf.CLIPImageProcessor(
        size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)
    )
    return saved(tmp_path, hf.CLIPModel(config), processor, words)


@pytest.fixture
def siglip(tmp_path, words):
    config = hf.SiglipConfig(text_config=TEXT, vision_config=VISION)
    processor = hf.SiglipImageProcessor(size=dict(height=32, width=32))
    return saved(tmp_path, hf.SiglipModel(config), processor, words)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_scores_of_transformers_are_those_of_its_own_forward(kind, request, words):
    """Logits of the whole model, as its documentation computes them, up to scale and bias."""
    name = request.getfixturevalue(kind)
    teacher = open_teacher(name)
    images = torch.rand(2, 3, 32, 32)
    model = MODELS[kind].from_pretrained(name.removeprefix("hf:")).eval()
    texts = [f"a photo of a {name}." for name in NAMES]
    # CLIP's documentation pads to the longest text, SigLIP's to the full length
    how = dict(padding=True) if kind == "clip" else dict(padding="max_length", max_length=10)
    tokens = words(texts, return_tensors="pt", **how)
    with torch.no_grad():
        theirs = model(pixel_values=(images - teacher.mean) / teacher.std, **tokens)
    logits = theirs.logits_per_image
    if kind == "siglip":
        logits = logits - model.logit_bias
    ours = F.normalize(teacher(Batch(images)).summary, dim=-1) @ text_classifier(name, NAMES).T
    torch.testing.assert_close(model.logit_scale.exp() * ours, logits, atol=1e-4, rtol=1e-4)


def test_many_classes_go_through_in_parts(clip):
    names = ["cat", "dog"] * BATCH
    weights = text_classifier(clip, names, TEMPLATES)
    torch.testing.assert_close(weights[-2:], text_classifier(clip, ["cat", "dog"], TEMPLATES))
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(len(names)))


def test_a_folder_in_open_clips_form_brings_its_tokenizer(tiny, tmp_path, words):
    text = dict(tiny["tiny-vit"]["text_cfg"], vocab_size=12, hf_tokenizer_name="here")
    config = dict(model_cfg=dict(tiny["tiny-vit"], text_cfg=text), preprocess_cfg={})
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    name = f"open_clip:local-dir:{tmp_path}/random"
    with pytest.raises(ValueError, match=r"tokenizer of open_clip:local-dir.* could not be opened"):
        text_classifier(name, NAMES)
    words.save_pretrained(tmp_path)
    assert text_classifier(name, NAMES).shape == (3, 12)


def test_a_missing_tokenizer_is_reported_with_the_files_to_put(clip, tmp_path):
    """transformers makes an empty tokenizer of it, which knows no word."""
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer of hf:.* Put tokenizer\.json"):
        text_classifier(clip, NAMES)


@pytest.mark.parametrize("teacher", ["timm:test_vit/random", "rule:colour"])
def test_a_teacher_without_text_is_refused(teacher):
    for given in (teacher, open_teacher(teacher)):
        with pytest.raises(ValueError, match=r"has no text tower; .*open_clip and hf"):
            text_classifier(given, NAMES)


def test_a_vision_model_of_transformers_has_no_text_tower(tmp_path, words):
    processor = hf.ViTImageProcessor(size=dict(height=32, width=32))
    name = saved(tmp_path, hf.ViTModel(hf.ViTConfig(**VISION)), processor, words)
    with pytest.raises(ValueError, match="has no text tower that its images are compared with"):
        text_classifier(name, NAMES)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [((), TEMPLATES, "at least one"), (NAMES, (), "at least one"), (NAMES, ("a photo",), "no {}")],
)
def test_nothing_to_classify_by_is_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        text_classifier("open_clip:tiny-vit/random", names, templates)
