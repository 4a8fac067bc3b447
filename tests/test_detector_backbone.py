"""Our backbones inside transformers' detectors: they train, and they come back from a file."""

import pytest
import timm
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from zoo.detector_backbone import ZooBackbone, ZooBackboneConfig  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Not ours: transformers 5 with torch 2.15.
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]

PYRAMIDS = {
    "eradio_nano": dict(pad_input=True),
    "fastervit_0": dict(
        depths=(1, 1, 1, 1), dim=16, num_heads=(2, 2), stem_dim=8, drop_path_rate=0.0
    ),
    "mambavision_t": dict(
        depths=(1, 1, 2, 2), dim=16, num_heads=(2, 2), stem_dim=8, drop_path_rate=0.0
    ),
}
TINY = PYRAMIDS | {"radio_vit_base_patch16": dict(depth=3, embed_dim=32, num_heads=2)}
COMMON = dict(
    d_model=32,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    decoder_layers=2,
    num_queries=5,
    num_labels=3,
)


def backbone(name, **options):
    levels = [0, 1, 2] if name.startswith("radio") else [1, 2, 3]
    return ZooBackboneConfig(backbone=name, out_indices=levels, options=TINY[name] | options)


def detr(config):
    config = transformers.DetrConfig(backbone_config=config, encoder_layers=1, **COMMON)
    return transformers.DetrForObjectDetection(config)


def deformable_detr(config):
    config = transformers.DeformableDetrConfig(
        backbone_config=config, encoder_layers=1, num_feature_levels=3, **COMMON
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr(config):
    config = transformers.RTDetrV2Config(
        backbone_config=config,
        encoder_in_channels=transformers.AutoBackbone.from_config(config).channels,
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_denoising=0,
        **COMMON,
    )
    return transformers.RTDetrV2ForObjectDetection(config)


def loss_of(detector, images):
    labels = [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2]])}
        for _ in images
    ]
    return detector(images, labels=labels).loss


PAIRS = [
    *((detr, name) for name in TINY),
    *((deformable_detr, name) for name in TINY),
    *((rt_detr, name) for name in PYRAMIDS),
]


@pytest.mark.parametrize(("make", "name"), PAIRS)
def test_the_loss_of_a_detector_reaches_every_weight_of_its_backbone(make, name):
    detector = make(backbone(name))
    loss_of(detector, torch.randn(2, 3, 64, 96)).backward()
    weights = dict(detector.model.backbone.named_parameters())
    assert len(weights) > 20
    assert [key for key, p in weights.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("make", "name"), PAIRS)
def test_a_saved_detector_comes_back_with_the_same_features(make, name, tmp_path):
    detector = make(backbone(name)).eval()
    detector.save_pretrained(tmp_path)
    again = type(detector).from_pretrained(tmp_path).eval()
    wrapper = again.model.backbone.model
    assert isinstance(wrapper, ZooBackbone)
    assert set(wrapper.config.options) == set(TINY[name])
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours = detector.model.backbone.model(images).feature_maps
        theirs = wrapper(images).feature_maps
        assert all(a.std() > 0 for a in ours)
        assert all(map(torch.equal, ours, theirs))
        assert torch.equal(detector(images).pred_boxes, again(images).pred_boxes)


def test_transformers_own_wrapper_finds_our_names_and_reloads_a_detector(tmp_path):
    config = transformers.TimmBackboneConfig(backbone="eradio_nano", out_indices=[1, 2, 3])
    detector = rt_detr(config)
    loss_of(detector, torch.randn(1, 3, 64, 96)).backward()
    assert all(p.grad is not None for p in detector.model.backbone.parameters())
    detector.eval().save_pretrained(tmp_path)
    again = type(detector).from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(detector(images).logits, again(images).logits)


@pytest.mark.parametrize("name", TINY)
def test_the_feature_maps_are_those_of_timm_with_the_same_weights(name):
    config = backbone(name)
    inside = transformers.AutoBackbone.from_config(config).eval()
    outside = timm.create_model(
        name, features_only=True, out_indices=tuple(config.out_indices), **TINY[name]
    ).eval()
    inside.model.load_state_dict(outside.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = outside(images)
        assert all(map(torch.equal, inside(images).feature_maps, theirs))
        assert all(map(torch.equal, inside(images, return_dict=False)[0], theirs))
    assert inside.channels == [m.shape[1] for m in theirs]


def test_an_option_reaches_the_model():
    images = torch.randn(1, 3, 70, 50)
    padded = transformers.AutoBackbone.from_config(backbone("eradio_nano"))
    assert [m.shape[-2:] for m in padded(images).feature_maps] == [(9, 7), (5, 4), (3, 2)]
    plain = transformers.AutoBackbone.from_config(backbone("eradio_nano", pad_input=False))
    with pytest.raises(ValueError, match="32"):
        plain(images)


def test_what_the_backbone_cannot_give_is_refused():
    model = transformers.AutoBackbone.from_config(backbone("eradio_nano"))
    with pytest.raises(ValueError, match="out_indices"):
        model(torch.randn(1, 3, 64, 64), output_hidden_states=True)
    with pytest.raises(ValueError, match="No backbone is named"):
        ZooBackbone(ZooBackboneConfig())
