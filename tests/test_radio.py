"""RADIO: the reference's numbers, timm's contract, and what must hold for any image."""

import copy
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from zoo.layers.vitdet import VitDet
from zoo.radio import RELEASES, SIZES
from zoo.radio_weights import published

GOLDEN = Path(__file__).parent / "golden"
CARDS = sorted(path.stem for path in GOLDEN.glob("radio_vit_*.json"))
STEP = 8
TINY = dict(
    embed_dim=32, depth=4, num_heads=2, patch_size=STEP, img_size=32, max_img_size=64, reg_tokens=3
)
HEADS = dict(
    clip=dict(token=0, summary=dict(hidden=8, out_dim=6), feature=dict(hidden=8, out_dim=5)),
    sam=dict(token=3, feature=dict(hidden=8, out_dim=4, upsample=2)),
)


def tiny(**kwargs):
    return timm.create_model("radio_vit_base_patch16", **(TINY | kwargs)).eval()


@pytest.fixture
def lively(golden):
    """A tiny model whose every branch shows in the output: weights by the golden rule."""

    def build(**kwargs):
        model = tiny(**kwargs)
        golden.fill(model)
        return model

    return build


def images(rows=32, cols=48, batch=2):
    return torch.rand(batch, 3, rows, cols)


# -- the reference's numbers ---------------------------------------------------------------------


def _arguments(card, shapes):
    """Translate what a card's constructor call says, and shapes do not: windows and adaptors."""
    size = next(n for n, s in SIZES.items() if s["embed_dim"] == shapes["pos_embed"][-1])
    kwargs = {}
    if windows := re.search(r"vitdet window (\d+), num_global (\d+)", card["call"]):
        kwargs["vitdet"] = dict(window=int(windows[1]), num_global=int(windows[2]))
    if adaptors := re.search(r"; adaptors (\{.*\})$", card["call"]):
        teachers = re.search(r"teachers (\S+) with summary and (\S+) without", card["call"])
        order = [*teachers[1].split("/"), *teachers[2].split("/")]
        kwargs["adaptors"] = {
            name: dict(token=order.index(name), **{k: _head(v) for k, v in heads.items()})
            for name, heads in json.loads(adaptors[1]).items()
        }
    return f"radio_vit_{size}", kwargs


def _head(sizes):
    factor = sizes.get("upsample_factor", 1)
    return dict(
        hidden=sizes["hidden_dim"],
        out_dim=sizes["output_dim"] // factor**2,  # the card counts what the last layer emits
        num_inner=sizes["num_inner"],
        upsample=factor,
    )


def run_with_taps(model, x, wanted):
    """Everything that a card compares, by its names."""
    taps, hooks = {}, []

    def watch(name, part):
        hooks.append(part.register_forward_hook(lambda *call: taps.update({name: call[2]})))

    watch("tokens", model.norm_pre)
    for i, block in enumerate(model.blocks):
        watch(f"block{i}", block)
    outputs = model.radio(x)
    for hook in hooks:
        hook.remove()
    outputs = outputs if isinstance(outputs, dict) else {"backbone": outputs}
    for name, pair in outputs.items():
        root = "" if name == "backbone" else f"{name}."
        taps |= {f"{root}summary": pair.summary, f"{root}features": pair.features}
    maps = model.radio(x, "NCHW")
    taps["features_nchw"] = (maps["backbone"] if isinstance(maps, dict) else maps).features
    intermediate = re.compile(r"(sparse|dense)\.([a-z-]+)\.(\d+)\.features")
    wanted_keys = [found.groups() for tap in wanted if (found := intermediate.fullmatch(tap))]
    for aggregation, scheme in dict.fromkeys(pair[:2] for pair in wanted_keys):
        indices = [int(i) for a, s, i in wanted_keys if (a, s) == (aggregation, scheme)]
        pairs = model.forward_intermediates(
            x,
            indices,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
            aggregation=aggregation,
            norm_alpha_scheme=scheme,
        )
        for i, (features, prefix) in zip(indices, pairs, strict=True):
            root = f"{aggregation}.{scheme}.{i}"
            taps[f"{root}.features"] = features
            taps[f"{root}.prefix_summary"] = model.select_summary(prefix)
    return {tap: taps[tap] for tap in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_every_tap_equals_the_reference_and_its_checkpoint_goes_both_ways(golden, tmp_path, name):
    card, state = golden.load_card(name), golden.make_state_dict(name)
    torch.save(dict(state_dict=state), tmp_path / "card.pth.tar")
    shapes = {key.rpartition(".")[2]: shape for key, (shape, _) in card["state_dict"].items()}
    ours, kwargs = _arguments(card, shapes)
    model = timm.create_model(
        ours,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "card.pth.tar")),
        **kwargs,
    )
    back = published(model.state_dict())
    assert {key: list(value.shape) for key, value in back.items()} == {
        key: shape for key, (shape, _) in card["state_dict"].items()
    }
    torch.testing.assert_close({key: back[key] for key in state}, state, rtol=0, atol=0)
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        for case, info in card["cases"].items():
            report = golden.compare(
                model,
                name,
                run=lambda m, x, info=info: run_with_taps(m, x, info["taps"]),
                cases=[case],
                refill=False,
            )
            assert report["ok"], (dtype, case, report["worst"])


@pytest.mark.slow
def test_a_plain_model_takes_the_reference_checkpoint_as_checkpoint_path(golden, tmp_path):
    state = golden.make_state_dict("radio_vit_base_patch16")
    torch.save(state, tmp_path / "card.pth")
    model = timm.create_model("radio_vit_base_patch16", checkpoint_path=tmp_path / "card.pth")
    back = published(model.state_dict())
    torch.testing.assert_close({key: back[key] for key in state}, state, rtol=0, atol=0)


has_radio = pytest.mark.skipif(
    not timm.is_model("vit_base_patch16_radio_v3"), reason="this timm has no RADIO of its own"
)


@has_radio
@pytest.mark.parametrize(
    "size, theirs",
    [
        ("base_patch16.c_radio_v3", "vit_base_patch16_radio_v3"),
        ("large_patch16.c_radio_v3", "vit_large_patch16_radio_v3"),
        ("huge_patch16.c_radio_v3", "vit_huge_patch16_radio_v3"),
        ("giant_patch16.c_radio_v3", "vit_giant_patch16_radio_v3"),
        ("so400m_patch16.c_radio_v4", "vit_so400m_patch16_radio_v4"),
        ("huge_patch16.c_radio_v4", "vit_huge_patch16_radio_v4"),
    ],
)
def test_every_release_in_timm_has_the_same_blocks_and_tokens(size, theirs):
    with torch.device("meta"):
        names = f"radio_vit_{size}", theirs
        ours, timms = (timm.create_model(name, depth=2, weight_init="skip") for name in names)
    shapes = [
        {k: v.shape for k, v in model.state_dict().items() if k.split(".")[0] in parts}
        for model in (ours, timms)
        for parts in [("blocks", "cls_token", "reg_token")]
    ]
    assert shapes[0] == shapes[1]
    weight = "patch_embed.proj.weight"
    assert ours.state_dict()[weight].shape == timms.state_dict()[weight].shape


@has_radio
@pytest.mark.parametrize("aligned", [True, False])
def test_timms_own_class_gives_the_same_features_from_the_same_file(lively, aligned):
    # timm decides `align_corners` by the name of the model; its filter function takes the flag.
    from timm.models.vision_transformer import checkpoint_filter_fn

    ours = lively(init_values=1e-5, align_corners=aligned, patch_bias=False)
    theirs = timm.create_model(
        "vit_base_patch16_radio_v3",
        img_size=(32, 48),
        patch_size=STEP,
        embed_dim=32,
        depth=4,
        num_heads=2,
        reg_tokens=3,
    ).eval()
    state = {f"radio_model.{key}": value for key, value in published(ours.state_dict()).items()}
    theirs.load_state_dict(
        checkpoint_filter_fn(
            state, theirs, interpolation="bilinear", antialias=False, align_corners=aligned
        )
    )
    x = images()
    normalised = ours.input_conditioner(x)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(normalised))
    torch.testing.assert_close(ours(x), theirs(normalised))


# -- any image -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols, batch", [(8, 8, 1), (32, 48, 3), (64, 64, 2), (96, 16, 1)])
def test_images_of_any_multiple_of_the_patch_are_taken(rows, cols, batch):
    model = tiny()
    summary, features = model.radio(images(rows, cols, batch))
    assert summary.shape == (batch, model.summary_dim) == (batch, 3 * 32)
    assert features.shape == (batch, rows * cols // STEP**2, 32)
    maps = model.radio(images(rows, cols, batch), "NCHW").features
    assert maps.shape == (batch, 32, rows // STEP, cols // STEP)


def test_other_sides_are_refused_with_the_nearest_size():
    with pytest.raises(ValueError, match=r"is 30x44.*multiples of 8.*32x48"):
        tiny()(images(30, 44))
    with pytest.raises(ValueError, match=r"is 32x48.*multiples of 24.*24x48"):
        tiny(vitdet=dict(window=3, num_global=2))(images(32, 48))


def test_the_nearest_supported_resolution_counts_windows_in():
    model = tiny()
    assert model.get_nearest_supported_resolution(30, 3) == (32, 8)
    model.vitdet = VitDet(window=3, num_global=2)
    assert model.get_nearest_supported_resolution(30, 3) == (24, 24)


def test_pixels_are_normalised_inside_until_that_is_taken_out():
    model, x = tiny(), images()
    before = model(x)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == ((0,) * 3, (1,) * 3)
    outside = model.make_preprocessor_external()
    torch.testing.assert_close(model(outside(x)), before)
    assert not torch.allclose(model(x), before)
    assert model.pretrained_cfg["mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert model.make_preprocessor_external()(x) is x


def test_adaptors_come_beside_the_backbone():
    model, x = tiny(adaptors=HEADS), images(batch=3)
    outputs = model.radio(x)
    assert list(outputs) == ["backbone", "clip", "sam"]
    assert outputs["clip"].summary.shape == (3, 6)
    assert outputs["clip"].features.shape == (3, 24, 5)
    assert outputs["sam"].summary is None
    assert outputs["sam"].features.shape == (3, 96, 4)
    maps = model.radio(x, "NCHW")
    assert maps["sam"].features.shape == (3, 4, 8, 12)
    rows = maps["sam"].features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows, outputs["sam"].features)
    torch.testing.assert_close(maps["clip"].summary, outputs["clip"].summary)


def test_the_feature_normalizer_acts_on_patches_before_the_adaptors(lively):
    plain, x = lively(adaptors=HEADS), images()
    model = tiny(adaptors=HEADS, feature_normalizer=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    model.feature_normalizer.tx.copy_(rotation)
    model.feature_normalizer.mean.normal_()
    before, after = plain.radio(x), model.radio(x)
    expected = (before["backbone"].features - model.feature_normalizer.mean) @ rotation.T
    torch.testing.assert_close(after["backbone"].features, expected)
    torch.testing.assert_close(after["backbone"].summary, before["backbone"].summary)
    heads = model.adaptors["clip"].feat_mlp(expected)
    torch.testing.assert_close(after["clip"].features, heads)


# -- windowed attention --------------------------------------------------------------------------


def test_windows_change_nothing_that_is_global(lively):
    model, x = lively(), images()
    expected = model.radio(x)
    model.vitdet = VitDet(window=2, num_global=4)
    torch.testing.assert_close(model.radio(x), expected)


def test_windowed_blocks_see_one_window_and_no_prefix(lively):
    model = lively(vitdet=dict(window=2, num_windowed=3))
    x = images(32, 32, 1)
    y = x.clone()
    y[..., :16, :16] = 1 - y[..., :16, :16]  # one window of four, by four patches
    first = [
        model.forward_intermediates(image, [0, 3], True, intermediates_only=True)
        for image in (x, y)
    ]
    (a, token_a), (b, token_b) = (maps[0] for maps in first)
    changed = (a != b).any(dim=1)[0]
    assert changed[:2, :2].all()
    assert not changed[2:].any()
    assert not changed[:, 2:].any()
    torch.testing.assert_close(token_a, token_b, rtol=0, atol=0)
    assert (first[0][1][0] != first[1][1][0]).any(dim=1).all()  # the last block is global


def test_a_model_may_be_entered_again_with_another_size_while_it_runs(lively):
    model = lively(vitdet=dict(window=2, num_global=2))
    x, other = images(), images(16, 16)
    expected = model(x)
    entered = []

    def enter(*_):
        hook.remove()
        entered.append(model(other))

    hook = model.blocks[1].register_forward_pre_hook(enter)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(entered[0], model(other))


def test_intermediates_of_windowed_blocks_are_in_raster_order(lively):
    model, x = lively(vitdet=dict(window=2, num_windowed=1)), images()
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final[:, 4:])
    short = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(short[0], maps[1])


def test_a_pruned_model_keeps_its_windows(lively):
    model, x = lively(vitdet=dict(window=2, num_windowed=2)), images()
    expected = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    got = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    torch.testing.assert_close(got, expected)


# -- positions in training -----------------------------------------------------------------------


def _positions_of(model, x):
    """What training adds to the patches of each image."""
    outputs = []
    hook = model.norm_pre.register_forward_hook(lambda *call: outputs.append(call[2]))
    model(x)
    hook.remove()
    patches = model.patch_embed(model.input_conditioner(x)).flatten(1, 2)
    return outputs[0][:, model.num_prefix_tokens :] - patches


def test_each_image_of_a_training_batch_has_its_own_window(lively):
    model = lively(pos_dropout=0.0).train()
    positions = _positions_of(model, images(batch=4))
    assert all((positions[i] - positions[j]).abs().max() > 1e-2 for i in range(4) for j in range(i))


def test_frames_of_a_clip_share_their_window(lively):
    model = lively(pos_dropout=0.0).train()
    with model.cpe_video_mode(2):
        positions = _positions_of(model, images(batch=4))
        with pytest.raises(ValueError, match="3 images do not divide into clips of 2"):
            model(images(batch=3))
    torch.testing.assert_close(positions[0], positions[1])
    torch.testing.assert_close(positions[2], positions[3])
    assert not torch.allclose(positions[0], positions[2])
    assert model.frames_per_crop == 1


def test_positions_are_dropped_for_whole_images_at_the_promised_rate(lively):
    model = lively(pos_dropout=0.25).train()
    positions = _positions_of(model, images(16, 16, 400))
    dropped = positions.abs().amax(dim=(1, 2)) < 1e-5
    assert 0.15 < dropped.float().mean() < 0.35
    assert (positions[~dropped].abs().amax(dim=(1, 2)) > 1e-2).all()


def test_the_largest_image_is_neither_cropped_nor_dropped(lively):
    model, x = lively(pos_dropout=1.0), images(64, 64)
    expected = model.eval()(x)
    torch.testing.assert_close(model.train()(x), expected)


def test_training_without_crops_or_dropout_sees_the_positions_of_inference(lively):
    model, x = lively(crop_positions=False, pos_dropout=0.0), images()
    torch.testing.assert_close(model.train()(x), model.eval()(x))


# -- intermediates -------------------------------------------------------------------------------


@pytest.fixture(params=["common", "per_layer"])
def normalizing(lively, request):
    model = lively(intermediate_normalizer=request.param)
    normalizer = model.intermediate_normalizer
    normalizer.alphas.copy_(torch.tensor([0.5, 2.0, 3.0, 0.25]))
    normalizer.rotation.normal_()
    return model


def _by_hand(model, x, layers, scheme):
    n = model.intermediate_normalizer
    plain = copy.deepcopy(model)
    plain.intermediate_normalizer = None
    maps = plain.forward_intermediates(x, layers, output_fmt="NLC", intermediates_only=True)
    rotation = n.rotation if n.rotation.ndim == 2 else n.rotation[layers[-1]]
    y = torch.stack([(m - n.means[i]) @ rotation.T for i, m in zip(layers, maps, strict=True)])
    alphas = n.alphas[layers].view(-1, 1, 1, 1)
    return dict(
        **{"post-alpha": alphas.mean() * y.mean(0), "pre-alpha": (alphas * y).mean(0)},
        none=y.mean(0),
    )[scheme]


@pytest.mark.parametrize("scheme", ["post-alpha", "pre-alpha", "none"])
def test_dense_intermediates_are_means_since_the_previous_index(normalizing, scheme):
    x = images()
    got = normalizing.forward_intermediates(
        x,
        [0, 3],
        output_fmt="NLC",
        intermediates_only=True,
        aggregation="dense",
        norm_alpha_scheme=scheme,
    )
    torch.testing.assert_close(got[0], _by_hand(normalizing, x, [0], scheme))
    torch.testing.assert_close(got[1], _by_hand(normalizing, x, [1, 2, 3], scheme))


def test_sparse_intermediates_are_normalised_patches_beside_untouched_prefixes(normalizing):
    x = images()
    (y, prefix), *_ = normalizing.forward_intermediates(
        x, [2], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(y, _by_hand(normalizing, x, [2], "post-alpha"))
    normalizing.intermediate_normalizer = None
    plain = normalizing.forward_intermediates(x, [2], True, intermediates_only=True)
    torch.testing.assert_close(prefix, plain[0][1])


def test_wrong_ways_to_ask_for_intermediates_are_refused():
    model, x = tiny(), images()
    for wrong in (
        dict(aggregation="all"),
        dict(norm_alpha_scheme="alpha"),
        dict(output_fmt="NHWC"),
        dict(indices=[3, 1], aggregation="dense"),
    ):
        with pytest.raises(ValueError, match=r"There is no|ascending"):
            model.forward_intermediates(x, **wrong)


# -- timm's contract -----------------------------------------------------------------------------


def test_intermediates_end_with_what_forward_features_gives():
    model, x = tiny(), images()
    final, maps = model.forward_intermediates(x, 1, norm=True)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), final[:, 4:])
    named = model.forward_intermediates(x, 2, return_prefix_tokens=True, output_dict=True)
    assert [len(named[f"image_intermediates{end}"]) for end in ("", "_prefix")] == [2, 2]
    torch.testing.assert_close(named["image_features"], final)


def test_one_channel_and_bfloat16_and_no_registers_work():
    assert tiny(in_chans=1)(torch.rand(1, 1, 16, 24)).shape == (1, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny().train()(images()).isfinite().all()
    model = tiny(reg_tokens=0, summary_idxs=(0,)).bfloat16()
    assert model.radio(images().bfloat16()).summary.isfinite().all()


def test_the_nominal_size_is_set_and_the_grid_of_positions_stays():
    model = tiny()
    grid = model.pos_embed
    model.set_input_size((64, 48))
    assert model.patch_embed.img_size == (64, 48)
    assert model.pos_embed is grid
    model.set_input_size((64, 48), patch_size=(4, 4))
    assert model(images(20, 16)).shape == (2, 32)


def test_unknown_arguments_and_wrong_tokens_are_refused():
    with pytest.raises(TypeError, match="windows"):
        tiny(windows=3)
    with pytest.raises(ValueError, match=r"token 4; .* 0 to 3"):
        tiny(summary_idxs=(0, 4))
    with pytest.raises(ValueError, match="by name, but no file"):
        tiny(adaptors=["clip"])
    with pytest.raises(ValueError, match="'common' or 'per_layer'"):
        tiny(intermediate_normalizer="all")
    with pytest.raises(ValueError, match="NLC and NCHW"):
        tiny().radio(images(), "NHWC")


def test_every_release_says_its_size_and_licence():
    for name, release in RELEASES.items():
        cfg = timm.get_pretrained_cfg(f"radio_vit_{name}")
        assert cfg.license in ("nvidia-open-model-license", "nscl-nc")
        assert ("c_radio" in name) == (cfg.license == "nvidia-open-model-license")
        assert cfg.input_size == (3, release.size, release.size)


# -- spectral reparametrisation ------------------------------------------------------------------


def test_folding_the_spectral_norms_keeps_the_trained_outputs(lively):
    model, x = lively(pos_dropout=0.0), images()
    before = model(x)
    model.set_spectral()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model.train()(x).square().mean().backward()
    optimizer.step()
    trained = model.eval()(x)
    assert not torch.allclose(trained, before, atol=1e-3)
    plain = tiny()
    plain.load_state_dict(model.state_dict())  # baked in
    model.set_spectral(False)
    assert sorted(model.state_dict()) == sorted(plain.state_dict())
    for other in (model, plain):
        torch.testing.assert_close(other(x), trained)


def test_spectral_norms_split_q_k_v_and_gates_and_spare_the_patches():
    from timm.layers import SwiGLUPacked

    model = tiny(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    model.set_spectral(scale_values=False)
    block = model.blocks[0]
    parts = [m.parametrizations.weight[0] for m in (block.attn.qkv, block.mlp.fc1)]
    assert [len(part.parts) for part in parts] == [2, 2]
    assert not nn.utils.parametrize.is_parametrized(model.patch_embed.proj)


# -- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vitdet", [None, dict(window=2, num_global=2)])
def test_an_exported_program_gives_the_same_outputs(lively, vitdet):
    model, x = lively(vitdet=vitdet, depth=2), images()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


class _AsTuple(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        outputs = self.model.radio(x, "NCHW")
        return tuple(t for pair in outputs.values() for t in pair if t is not None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_gives_the_same_outputs_for_any_batch(lively, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = _AsTuple(lively(adaptors=HEADS, vitdet=dict(window=2, num_global=2))).eval()
    path = tmp_path / "radio.onnx"
    batch = torch.export.Dim("batch", min=2, max=8)
    torch.onnx.export(model, (images(),), path, dynamo=True, dynamic_shapes=({0: batch},))
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(batch=5)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for ours, theirs in zip(model(x), got, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)
