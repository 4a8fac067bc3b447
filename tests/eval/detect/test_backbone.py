"""Any timm model as a detector's backbone: its maps, what it freezes, the simple pyramid."""

import pytest
import timm
import torch
from timm.layers import DropPath

import zoo
from zoo.eval.detect.backbone import Backbone, SimplePyramid
from zoo.features import read_features

SMALL = {
    "eradio_nano": dict(pad_input=False),
    "fastervit_0": dict(depths=(1, 1, 1, 1), dim=8, num_heads=(1, 2), stem_dim=8),
    "mambavision_t": dict(depths=(1, 1, 2, 2), dim=8, num_heads=(1, 2), stem_dim=8),
    "resnet10t": dict(zero_init_last=False),
}
PLAIN = {
    "radio_vit_base_patch16": dict(depth=3, embed_dim=32, num_heads=2),
    "vit_tiny_patch16_224": dict(depth=3, embed_dim=32, num_heads=2),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_maps_of_a_pyramid_are_those_of_timm(name):
    ours = Backbone(name, options=SMALL[name], out_norm=False).eval()
    theirs = timm.create_model(name, num_classes=0, **SMALL[name]).eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = ours(images)
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        first = {64 // m.shape[2]: m for m in reversed(expected)}  # E-RADIO has one more, dense
    assert ours.strides == (4, 8, 16, 32)
    assert ours.channels == tuple(m.shape[1] for m in maps)
    assert all(m.std() > 0 for m in maps)
    assert all(torch.equal(m, first[stride]) for m, stride in zip(maps, ours.strides, strict=True))


@pytest.mark.parametrize("name", SMALL | PLAIN)
def test_any_size_gives_a_cell_for_each_stride_begun_and_every_weight_a_gradient(name):
    model = Backbone(name, options=(SMALL | PLAIN)[name])
    maps = model(torch.randn(2, 3, 70, 101))
    for level, stride, chs in zip(maps, model.strides, model.channels, strict=True):
        assert level.shape == (2, chs, -(-70 // stride), -(-101 // stride))
    # a norm's output has mean 0 over channels, so its plain sum would say nothing
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_transformer_gives_its_last_map_as_features_are_read(name):
    options = PLAIN[name] | dict(img_size=64)
    model = Backbone(name, options=options).eval()
    assert model.is_plain and model.strides == (16,) and model.channels == (32,)
    theirs = timm.create_model(name, num_classes=0, **options).eval()
    theirs.load_state_dict(model.model.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (level,) = model(images)
        assert torch.equal(level.permute(0, 2, 3, 1), read_features(theirs, images).spatial)


@pytest.mark.parametrize("name", SMALL | PLAIN)
def test_frozen_stages_keep_weights_and_statistics_while_the_others_train(name):
    model = Backbone(name, options=(SMALL | PLAIN)[name], frozen_stages=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    sum((m * torch.randn_like(m)).sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    for parameter in model.parameters():  # the smallest gradients would round to no change
        parameter.grad = None if parameter.grad is None else parameter.grad.sign()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    still = {k for k in before if k not in moved}
    first = r"model.layer1" if name == "resnet10t" else r"model.blocks.0."
    first = first if name in PLAIN or name == "resnet10t" else "model.stages.0."
    assert any(k.startswith(first) for k in before)
    assert not any(k.startswith(first) for k in moved)
    stem = ("model.stem.", "model.conv1.", "model.patch_embed.", "model.cls_token")
    assert any(k.startswith(stem) for k in still) and not any(k.startswith(stem) for k in moved)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained <= moved and len(trained) > 10


def test_norm_eval_keeps_the_statistics_of_batch_norms():
    images = torch.randn(2, 3, 64, 64)
    for keep in (True, False):
        model = Backbone("resnet10t", norm_eval=keep).train()
        before = [b.clone() for b in model.buffers()]
        model(images)
        assert all(map(torch.equal, before, model.buffers())) is keep
        assert model.model.layer1.training


def test_windows_are_fitted_on_request_and_drop_path_reaches_the_blocks():
    model = Backbone(
        "mambavision_t", options=SMALL["mambavision_t"], img_size=(64, 96), drop_path_rate=0.3
    )
    assert [stage.window for stage in model.model.stages[2:]] == [6, 3]
    rates = [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    as_trained = Backbone("mambavision_t", options=SMALL["mambavision_t"])
    assert [stage.window for stage in as_trained.model.stages[2:]] == [14, 7]


def test_a_folder_that_timm_reads_gives_its_weights(tmp_path):
    from timm.models._hub import save_for_hf

    trained = zoo.create_model("eradio_nano", num_classes=0)
    save_for_hf(trained, str(tmp_path), model_args=dict(img_size=64), safe_serialization=True)
    model = Backbone(f"local-dir:{tmp_path}", pretrained=True)
    weights = trained.state_dict()
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="eradio_nano", out_indices=[7]), "levels 0 to 4"),
        (dict(name="resnet10t", frozen_stages=9), "frozen_stages 9"),
        (dict(name="levit_128s"), "out_indices"),
    ],
)
def test_what_a_model_does_not_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**fields)


def test_the_simple_pyramid_has_the_strides_that_were_asked_for():
    neck = SimplePyramid(32, 24, strides=(4, 8, 16, 32, 64, 128))
    maps = neck([torch.randn(2, 32, 5, 7)])
    sizes = [tuple(m.shape[1:]) for m in maps]
    assert sizes == [(24, 20, 28), (24, 10, 14), (24, 5, 7), (24, 3, 4), (24, 2, 2), (24, 1, 1)]
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_a_cell_of_the_simple_pyramid_lies_where_the_image_has_it():
    """A bright patch stays at its place on every level: nothing is shifted or turned."""
    neck = SimplePyramid(8, 8, strides=(4, 8, 16, 32))
    with torch.no_grad():
        for level in neck.levels:
            x = torch.zeros(1, 8, 8, 8)
            x[:, :, 4:6, 2:4] = torch.randn(8).view(8, 1, 1)  # on a black image, a lit square
            lit = level(x)
            dark = level(torch.zeros(1, 8, 8, 8))
            rows, cols = ((lit - dark).abs().sum(1)[0]).nonzero().float().mean(0)
            scale = lit.shape[-1] / 8
            centre = torch.tensor([rows + 0.5, cols + 0.5]) / scale
            torch.testing.assert_close(centre, torch.tensor([5.0, 3.0]), atol=1.5, rtol=0)


@pytest.mark.parametrize("stride", [2, 24, 48])
def test_a_stride_that_cannot_be_made_is_refused(stride):
    with pytest.raises(ValueError, match="cannot be made"):
        SimplePyramid(32, strides=(stride,))
