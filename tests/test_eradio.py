"""E-RADIO: the reference's numbers, the published sizes, timm's contract, and what must hold."""

import argparse
import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from zoo.deploy import deploy
from zoo.eradio import COMPUTED, RENAMES, ERadio, WindowUnit, checkpoint_filter_fn
from zoo.students.build import build_student
from zoo.teachers.open import open_teacher
from zoo.weights import read_state, rename_key, rename_keys

CARD = "eradio_xxxtiny"


def nano(**kwargs):
    return timm.create_model("eradio_nano", **kwargs)


def smallest(**kwargs):
    """Less than a nano, for what takes long to compile."""
    sizes = dict(depths=(1, 1, 1, 1), dim=8, num_heads=(1, 2), in_dim=8, neck_dim=8)
    return ERadio(**sizes, trained_window=2, bias_hidden=8, light=True, **kwargs)


@pytest.fixture
def lively(golden):
    """A nano whose every branch shows in the output: weights by the golden rule, not the start."""

    def build(**kwargs):
        model = nano(**kwargs).eval()
        golden.fill(model)
        return model

    return build


def published(**kwargs):
    return timm.create_model("eradio_xxxtiny", **kwargs)


# -- the reference's numbers ---------------------------------------------------------------------


def run_with_taps(model, x):
    """Everything that the golden card compares, by its names."""
    taps, hooks = {}, []

    def watch(name, part):
        hooks.append(part.register_forward_hook(lambda *call: taps.update({name: call[2]})))

    watch("stem", model.stem)
    watch("norm", model.norm)
    for i, stage in enumerate(model.stages):
        watch(f"stage{i}", stage)
        if i < 3:
            watch(f"down{i}", stage.downsample)
        for j, block in enumerate(stage.blocks):
            watch(f"block{i}" if i < 2 else f"block{i}.{j}", block)
    taps["logits"], taps["neck"] = model(x)
    for hook in hooks:
        hook.remove()
    taps["pooled"] = model.forward_head(taps["norm"], pre_logits=True)
    return taps


@pytest.mark.slow
@pytest.mark.parametrize("case", ["256", "224x320"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_tap_equals_the_reference(golden, case, dtype):
    model = published(return_full_features=True)
    model.load_state_dict(golden.make_state_dict(CARD), strict=False)  # without batch counts
    report = golden.compare(model.to(dtype), CARD, run=run_with_taps, cases=[case], refill=False)
    assert set(report["cases"][case]) == set(golden.load_card(CARD)["cases"][case]["taps"])
    assert report["ok"], report["worst"]


def test_the_renamed_keys_and_shapes_are_exactly_ours(golden):
    card = golden.load_card(CARD)["state_dict"]
    with torch.device("meta"):
        own = published().state_dict()
    renamed = rename_keys(card, RENAMES, drop=COMPUTED)
    assert {k: list(v.shape) for k, v in own.items()} == {k: s for k, (s, _) in renamed.items()}


def test_two_published_keys_never_become_one(golden):
    kept = [k for k in golden.load_card(CARD)["state_dict"] if not k.endswith(KEPT)]
    assert len({rename_key(k, RENAMES) for k in kept}) == len(kept) == 379 - 3 * 13


KEPT = ("relative_coords_table", "relative_position_index", "relative_bias")


@pytest.fixture
def published_state(golden):
    """A complete published checkpoint: tables that we compute and batch counts included."""
    state = golden.make_state_dict(CARD)
    for key, (shape, dtype) in golden.load_card(CARD)["state_dict"].items():
        state.setdefault(key, torch.zeros(shape, dtype=getattr(torch, dtype)))
    return state


def test_a_published_state_dict_loads_strictly_by_both_roads(published_state):
    one, two = published(), published()
    one.load_state_dict(published_state)
    two.load_state_dict(checkpoint_filter_fn(published_state, two))
    theirs = published_state["levels.3.blocks.4.attention_blocks.0.attn.qkv.weight"]
    assert one.stages[3].blocks[4][0].attn.qkv.weight.equal(theirs)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_a_published_state_dict_that_lacks_a_key_is_refused(published_state):
    del published_state["levels.2.blocks.0.attention_blocks.0.upsample_op.bias"]
    with pytest.raises(ValueError, match=r"1 missing: stages\.2\.blocks\.0\.0\.leave\.bias"):
        published().load_state_dict(published_state)


def test_a_copy_still_takes_published_keys(published_state):
    model = copy.deepcopy(published())
    model.load_state_dict(published_state)
    assert model.head.fc.bias.equal(published_state["head.bias"])


def test_a_file_in_radios_wrapping_loads_and_leaves_norm_and_head_alone(published_state, tmp_path):
    wrapped = {
        f"base_model.{k}": v
        for k, v in published_state.items()
        if not k.startswith(("norm.", "head."))
    }
    wrapped["input_conditioner.norm_mean"] = torch.zeros(3, 1, 1)
    path = tmp_path / "eradio.pth.tar"
    torch.save({"state_dict": wrapped, "args": argparse.Namespace(model="eradio")}, path)
    model = published(
        pretrained=True,
        num_classes=7,
        pretrained_cfg_overlay=dict(file=str(path), custom_load=True),
    )
    theirs = published_state["high_res_neck.neck_features_proj.1.conv2.weight"]
    assert model.neck.projections[1][1].weight.equal(theirs)
    assert model.norm.weight.equal(torch.ones(256))
    assert model.head.fc.weight.shape == (7, 256)


LIGHT = ("eradio_xxxtiny_8x_ws12", "eradio_xxxtiny_8x_ws16")


def light_state(golden, name):
    """A published file of a light one: the card's names, but for its units that halve the map."""
    state = {}
    for key, (shape, dtype) in golden.load_card(CARD)["state_dict"].items():
        if key.endswith(("downsample_op.bias", "upsample_op.bias")):
            continue
        resampling = re.fullmatch(r"(.+)\.(down|up)sample_op\.weight", key)
        if resampling:
            part = dict(down="downsample_mixer", up="upsample_op")[resampling[2]]
            place, dim = f"{resampling[1]}.{part}", shape[0]
            state[f"{place}.conv.weight"] = torch.randn(dim, dim, 1, 1) / dim**0.5
            for value in ("weight", "bias", "running_mean", "running_var"):
                state[f"{place}.bn.{value}"] = torch.rand(dim) + 0.5
            continue
        if ".pre_conv.conv." in key:
            shape = [shape[0], 1, 3, 3]
        elif ".cpb_mlp." in key:
            shape = [64 if side == 512 else side for side in shape]
        if name.endswith("ws12"):  # buffers that are computed: windows of 12 in place of 16
            shape = [{31: 23, 256: 144}.get(n, n) if key.endswith(KEPT) else n for n in shape]
        state[key] = (0.1 * torch.rand(shape) + 0.05).to(getattr(torch, dtype))
    if name.endswith("ws16"):  # its neck begins a stage earlier, at half the width
        for key in [key for key in reversed(state) if key.startswith("high_res_neck")]:
            number = int(key.split(".")[2])
            value = state[key]
            state[key.replace(f".{number}.", f".{number + 1}.", 1)] = value
            if not number:
                state[key] = torch.rand([64 if side == 128 else side for side in value.shape])
    return state


@pytest.mark.parametrize("name", LIGHT)
def test_a_file_of_a_light_one_loads_and_its_units_use_what_the_file_says(golden, name):
    """Mixers after the pooling, and after the repetition (spec: 1x1 convolution, batch norm)."""
    state = light_state(golden, name)
    model = timm.create_model(name, img_size=64).eval()
    model.load_state_dict(state)
    unit, theirs = model.stages[2].blocks[3][0], "levels.2.blocks.3.attention_blocks.0"

    def mixed(x, part):
        norm = (state[f"{theirs}.{part}.bn.{n}"] for n in ("running_mean", "running_var"))
        affine = (state[f"{theirs}.{part}.bn.{n}"] for n in ("weight", "bias"))
        return F.batch_norm(F.conv2d(x, state[f"{theirs}.{part}.conv.weight"]), *norm, *affine)

    x = torch.randn(2, 128, 4, 8)
    halved = mixed(F.avg_pool2d(x, 2), "downsample_mixer")
    torch.testing.assert_close(unit.enter(x), halved)
    torch.testing.assert_close(
        unit.leave(halved), mixed(F.interpolate(halved, scale_factor=2), "upsample_op")
    )


def test_a_teacher_and_a_student_start_from_a_file_of_a_light_one(golden, tmp_path):
    name, path = LIGHT[0], tmp_path / "light.pth.tar"
    torch.save({"state_dict": light_state(golden, name)}, path)
    direct = timm.create_model(name, num_classes=0, img_size=64).eval()
    direct.load_state_dict({k: v for k, v in read_state(path).items() if k[:5] != "head."})
    teacher = open_teacher(f"zoo:{name}/{path}@64")
    student = build_student(name, {}, size=64, start=path)
    for key, value in direct.state_dict().items():
        assert teacher.network.state_dict()[key].equal(value), key
        assert student.backbone.state_dict()[key].equal(value), key


def test_a_file_that_leaves_a_teacher_part_random_is_refused(golden, tmp_path):
    state = light_state(golden, LIGHT[0])
    path = tmp_path / "less.pth"
    torch.save({k: v for k, v in state.items() if ".downsample_mixer." not in k}, path)
    with pytest.raises(ValueError, match=r"20 missing: stages\.2\.blocks\.0\.0\.enter\.1\.conv"):
        open_teacher(f"zoo:{LIGHT[0]}/{path}@64")
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(ValueError, match="do not fit the model"):
        open_teacher(f"zoo:{LIGHT[0]}/{path}@64")


# -- the published sizes -------------------------------------------------------------------------


def test_the_card_counts_the_same_parameters(golden):
    with torch.device("meta"):
        model = published()
    count = sum(p.numel() for p in model.parameters())
    assert count == golden.load_card(CARD)["num_parameters"] == 10512520


def test_without_its_head_the_large_one_has_389_60_million():
    with torch.device("meta"):
        model = timm.create_model("eradio_l", num_classes=0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 389.60


@pytest.mark.parametrize("alias", ["eradio_large_fullres_ws16", "eradio"])
def test_published_names_build_the_large_one(alias):
    with torch.device("meta"):
        theirs, ours = timm.create_model(alias), timm.create_model("eradio_l")
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in ours.state_dict().items()
    ]
    assert theirs.pretrained_cfg == ours.pretrained_cfg


@pytest.mark.parametrize(
    ("name", "reduction", "width"),
    [("eradio_l", 16, 1536), ("eradio_xxxtiny_8x_ws16", 8, 256), ("eradio_nano", 16, 128)],
)
def test_the_dense_map_has_its_published_width_and_stride(name, reduction, width):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        (dense,) = model.forward_intermediates(
            torch.empty(1, 3, 64, 96), [-1], intermediates_only=True
        )
    assert dense.shape == (1, width, 64 // reduction, 96 // reduction)
    level = dict(num_chs=width, reduction=reduction, module="neck", index=4)
    assert model.feature_info[4] == model.feature_info[-1] == level
    assert len(model.feature_info) == 5


def test_the_weights_of_eradio_v2_are_named_with_their_licence():
    cfg = timm.get_pretrained_cfg("eradio_l.radio_v2")
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == ("nvidia/RADIO", "eradio_v2.pth.tar")
    assert cfg.license == "nscl-nc"
    assert cfg.input_size == (3, 512, 512)
    assert cfg.mean == timm.data.constants.OPENAI_CLIP_MEAN
    assert timm.list_models("eradio*", pretrained=True) == ["eradio_l.radio_v2"]


# -- timm's contract -----------------------------------------------------------------------------


def test_features_only_gives_the_four_stages_by_default():
    model = nano(features_only=True).eval()
    maps = model(torch.randn(1, 3, 64, 96))
    assert model.feature_info.channels() == [m.shape[1] for m in maps] == [16, 32, 64, 128]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert not [name for name, _ in model.named_parameters() if ".neck." in name]


def test_features_only_gives_the_dense_map_as_the_last_level(lively):
    x = torch.randn(2, 3, 64, 96)
    whole = lively()
    part = nano(features_only=True, out_indices=(1, -1)).eval()
    loaded = part.model.load_state_dict(whole.state_dict(), strict=False)
    assert (loaded.missing_keys, {k.split(".")[0] for k in loaded.unexpected_keys}) == (
        [],
        {"norm"},
    )
    stage, dense = part(x)
    assert part.feature_info.channels() == [32, 128]
    assert part.feature_info.reduction() == [8, 16]
    _, maps = whole.forward_intermediates(x)
    assert len(maps) == 5
    torch.testing.assert_close([stage, dense], [maps[1], maps[4]])


@pytest.mark.parametrize(
    ("indices", "levels"),
    [(1, [4]), (2, [3, 4]), ([-1, 0], [0, 4]), ([2], [2]), (None, [*range(5)])],
)
def test_indices_choose_levels_and_stopping_early_changes_nothing(lively, indices, levels):
    model, x = lively(), torch.randn(1, 3, 64, 64)
    every = model.forward_intermediates(x, intermediates_only=True)
    some = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
    torch.testing.assert_close(some, [every[i] for i in levels])


def test_stopping_early_leaves_the_later_stages_out():
    model, ran = nano(), []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.forward_intermediates(
        torch.randn(1, 3, 32, 32), [1], stop_early=True, intermediates_only=True
    )
    assert ran == [0, 1]


def test_the_dense_map_is_computed_only_for_those_who_ask():
    model, runs, x = nano(num_classes=2).eval(), [], torch.randn(1, 3, 32, 32)
    model.neck.register_forward_hook(lambda *_: runs.append(1))
    model(x)
    model.forward_features(x)
    model.forward_intermediates(x, [0, 1, 2, 3])
    assert runs == []
    model.forward_intermediates(x, [-1])
    assert runs == [1]


def test_full_features_are_the_logits_and_the_dense_map(lively):
    model, x = lively(num_classes=4, return_full_features=True), torch.randn(2, 3, 64, 96)
    logits, dense = model(x)
    _, (expected,) = model.forward_intermediates(x, [-1])
    torch.testing.assert_close(dense, expected)
    torch.testing.assert_close(logits, model.forward_head(model.forward_features(x)))
    assert dense.shape == (2, 128, 4, 6)


@pytest.mark.parametrize(("indices", "stages", "neck"), [([0, 1], 2, False), ([-1], 4, True)])
def test_pruning_keeps_what_the_levels_need_and_nothing_else(lively, indices, stages, neck):
    model, x = lively(num_classes=3), torch.randn(1, 3, 64, 64)
    before = model.forward_intermediates(x, indices, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices, prune_norm=True)
    assert kept == ([0, 1] if not neck else [4])
    assert (len(model.stages), model.neck is not None) == (stages, neck)
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.get_classifier(), nn.Identity)
    after = model.forward_intermediates(x, kept, intermediates_only=True)
    torch.testing.assert_close(after, before)


def test_every_parameter_left_after_pruning_to_the_dense_map_gets_a_gradient():
    model = nano()
    kept = model.prune_intermediate_layers([-1], prune_norm=True)
    (dense,) = model.forward_intermediates(torch.randn(2, 3, 64, 64), kept, intermediates_only=True)
    dense.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_layer_groups_follow_the_forward_pass():
    model = nano(num_classes=2)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    order = [
        "stem.0.conv.weight",
        "stages.0.blocks.0.enter.conv.weight",
        "stages.1.blocks.0.enter.conv.weight",
        "stages.2.blocks.0.0.attn.qkv.weight",
        "stages.2.blocks.1.0.attn.qkv.weight",
        "stages.3.blocks.0.0.attn.qkv.weight",
        "stages.3.blocks.1.0.attn.qkv.weight",
        "head.fc.weight",
    ]
    assert [groups[name] for name in order] == list(range(8))
    assert groups["stages.2.downsample.conv.weight"] == groups["stages.2.blocks.1.1.norm1.weight"]
    assert groups["neck.projections.0.1.weight"] == groups["head.fc.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.2.blocks.0.0.attn.qkv.weight"] == 3


# -- image sizes and windows ---------------------------------------------------------------------


def test_a_side_off_the_grid_is_refused_with_the_next_step():
    with pytest.raises(ValueError, match=r"33x64.*64x64.*pad_input"):
        nano()(torch.randn(1, 3, 33, 64))
    with pytest.raises(ValueError, match="100x100"):
        nano(img_size=100)


def test_padding_equals_zeros_appended_by_hand_and_cropped_maps(lively):
    x = torch.randn(2, 3, 50, 70)
    by_hand = F.pad(x, (0, 26, 0, 14))
    padded, plain = lively(pad_input=True), lively()
    final, maps = padded.forward_intermediates(x)
    expected_final, expected = plain.forward_intermediates(by_hand)
    torch.testing.assert_close(final, expected_final)
    sizes = [(13, 18), (7, 9), (4, 5), (2, 3), (4, 5)]
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    cropped = [m[..., :r, :c] for m, (r, c) in zip(expected, sizes, strict=True)]
    torch.testing.assert_close(maps, cropped)
    torch.testing.assert_close(padded(x), plain(by_hand))


def test_an_image_does_not_see_its_neighbour_in_the_batch(lively):
    model, x = lively(return_full_features=True), torch.randn(3, 3, 96, 64)
    whole = model(x)
    for i in range(3):
        torch.testing.assert_close([o[0] for o in model(x[i : i + 1])], [o[i] for o in whole])


def test_rows_and_columns_are_not_confused(lively):
    """Mirrored weights and a mirrored image give the mirrored dense map."""
    model, x = lively(), torch.randn(1, 3, 128, 256)
    (dense,) = model.forward_intermediates(x, [-1], intermediates_only=True)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.copy_(part.weight.mT.clone())
            if isinstance(part, WindowUnit):
                first = part.position.mlp[0].weight
                first.copy_(first.flip(1).clone())
    (mirrored,) = model.forward_intermediates(x.mT, [-1], intermediates_only=True)
    torch.testing.assert_close(mirrored.mT, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "window"),
    [
        (32, 1),
        (224, 7),
        (256, 8),
        (384, 12),
        (512, 16),
        (1024, 16),
        (1056, 11),
        ((256, 512), 8),
        ((224, 320), 7),
        ((256, 320), 10),
        ((512, 544), 16),
    ],
)
def test_a_size_chooses_its_window(size, window):
    with torch.device("meta"):
        model = nano(img_size=size)
    parts = [part for part in model.modules() if isinstance(part, WindowUnit)]
    assert {part.position.window for part in parts} == {window}
    assert [stage.multiple for stage in model.stages] == [1, 1, 2 * window, window]


def test_windows_are_chosen_by_size_or_given_or_as_trained():
    def window(model):
        return model.stages[3].blocks[0][0].position.window

    assert window(nano()) == 4
    assert window(nano(img_size=224)) == 7
    assert window(nano(window_size=2)) == 2
    assert window(nano(img_size=224, window_size=2)) == 2
    assert window(nano(img_size=200, pad_input=True)) == 7
    model = nano()
    model.set_input_size(224)
    assert window(model) == 7
    model.set_input_size(window_size=3)
    assert window(model) == 3


def test_a_size_that_no_window_fits_is_refused_with_the_next_step():
    with pytest.raises(ValueError, match=r"544x544.*17x17.*window_size"):
        nano(img_size=544)
    assert nano(img_size=544, window_size=16).stages[3].multiple == 16


@pytest.mark.parametrize(("kwargs", "match"), [({}, "Neither"), (dict(window_size=0), "is 0")])
def test_input_sizes_that_say_nothing_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        nano().set_input_size(**kwargs)


def test_position_biases_keep_the_trained_window_as_their_unit(lively):
    """The bias between two cells depends on their offset, whatever the window."""
    model = lively()
    position = model.stages[2].blocks[0][1].position
    wide = position().view(2, 4, 4, 4, 4)
    model.set_input_size(window_size=2)
    narrow = position().view(2, 2, 2, 2, 2)
    torch.testing.assert_close(narrow, wide[:, :2, :2, :2, :2])


def test_another_window_changes_the_output_and_the_trained_one_restores_it(lively):
    model, x = lively(), torch.randn(1, 3, 128, 128)
    before = model(x)
    model.set_input_size(window_size=2)
    assert not torch.allclose(model(x), before)
    model.set_input_size(window_size=4)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_weights_saved_with_other_windows_load_into_a_fresh_model(lively):
    model, x = lively(), torch.randn(1, 3, 64, 64)
    model.set_input_size(64)
    fresh = nano().eval()
    fresh.load_state_dict(model.state_dict())
    assert not torch.allclose(fresh(x), model(x))
    fresh.set_input_size(64)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


def test_maps_between_windows_are_enlarged_and_brought_back(lively):
    stage, inputs = lively().stages[2], []
    stage.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x = torch.randn(1, 64, 5, 9)
    out = stage(x)
    torch.testing.assert_close(inputs[0], F.interpolate(x, (8, 16)))
    assert out.shape == x.shape


def test_a_light_unit_halves_the_map_and_repeats_it():
    unit = nano().eval().stages[2].blocks[0][0]
    with torch.no_grad():
        unit.attn.proj.weight.zero_()
        unit.mlp.fc2.weight.zero_()
        for conv in (unit.enter[1].conv, unit.leave[1].conv):
            nn.init.dirac_(conv.weight)
    x = torch.randn(2, 64, 8, 16)
    halved = x.unflatten(3, (8, 2)).unflatten(2, (4, 2)).mean((3, 5))
    again = halved.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(unit(x, unit.position()), (x + again) / 2, rtol=1e-4, atol=1e-4)


def test_windows_do_not_see_each_other(lively):
    unit = lively().stages[2].blocks[0][1]
    unit.enter = nn.Identity()  # the convolution before attention crosses windows
    x = torch.randn(1, 64, 8, 8)
    other = x.clone()
    other[..., 4:, :] += 1
    out, changed = (unit(images, unit.position()) for images in (x, other))
    torch.testing.assert_close(out[..., :4, :], changed[..., :4, :])
    assert (out[..., 4:, :] - changed[..., 4:, :]).abs().amin((0, 1)).min() > 0


def test_a_neck_has_no_projection_where_nothing_has_to_change():
    model = nano(neck_start=3)
    assert isinstance(model.neck.projections[0], nn.Identity)
    x = torch.randn(1, 3, 64, 64)
    last, dense = model.forward_intermediates(x, [3, 4], intermediates_only=True)
    torch.testing.assert_close(dense, last, rtol=0, atol=0)


# -- training ------------------------------------------------------------------------------------


def test_drop_path_rises_linearly_over_the_attention_blocks():
    with torch.device("meta"):
        model = published(drop_path_rate=0.24)
    rates = [
        {getattr(unit.drop_path, "drop_prob", 0.0) for unit in block}
        for stage in model.stages[2:]
        for block in stage.blocks
    ]
    expected = [0.24 * i / 12 for i in range(4, 13)]
    assert [len(rate) for rate in rates] == [1] * 9
    torch.testing.assert_close([rate.pop() for rate in rates], expected)


def test_checkpointing_keeps_fewer_activations():
    model, kept = nano(), {}
    for enable in (False, True):
        sizes = []
        model.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(torch.randn(2, 3, 64, 64))
        kept[enable] = sum(sizes)
    assert kept[True] < kept[False] / 3


# -- other ways to run ---------------------------------------------------------------------------


def test_the_deploy_form_gives_the_same_maps(lively):
    model, x = lively(num_classes=3, return_full_features=True), torch.randn(2, 3, 96, 64)
    light = deploy(model)
    torch.testing.assert_close(light(x), model(x), rtol=1e-5, atol=1e-5)
    norms = [n for n, part in light.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == ["norm"]
    units = [part for part in light.modules() if isinstance(part, WindowUnit)]
    assert all(unit.position.fused is not None for unit in units)
    assert isinstance(model.stem[0].norm, nn.BatchNorm2d)


def test_the_dense_published_form_deploys_as_well(golden):
    unit = WindowUnit(16, 2, ratio=1, window=2, bias_hidden=8, light=False, drop_path=0.0)
    golden.fill(unit)
    unit.eval()
    x, bias = torch.randn(1, 16, 4, 6), unit.position()
    torch.testing.assert_close(deploy(unit)(x, bias), unit(x, bias), rtol=1e-5, atol=1e-5)
    halving = WindowUnit(16, 2, ratio=2, window=2, bias_hidden=8, light=False, drop_path=0.0)
    assert halving.eval()(torch.randn(1, 16, 4, 8), bias).shape == (1, 16, 4, 8)


def test_a_deployed_model_follows_a_new_window(lively):
    model, x = lively(), torch.randn(1, 3, 64, 64)
    light = deploy(model)
    for form in (model, light):
        form.set_input_size(window_size=2)
    torch.testing.assert_close(light(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pad_input", [pytest.param(False, marks=pytest.mark.long), True])
def test_one_graph_holds_the_whole_model(lively, pad_input):
    model = lively(num_classes=2, return_full_features=True, pad_input=pad_input)
    x = torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.long
def test_a_checkpointed_model_compiles_and_gives_the_same_gradients(golden):
    gradients = []
    for compiled in (False, True):
        model = smallest(num_classes=2).train()
        golden.fill(model)
        model.set_grad_checkpointing()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        run(x).square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "neck" not in n])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_pair_of_logits_and_dense_map_exports(lively):
    model, x = lively(return_full_features=True), torch.randn(1, 3, 64, 96)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_maps(lively):
    model, x = lively(return_full_features=True), torch.randn(2, 3, 128, 96)
    expected = model(x)
    found = model.cuda()(x.cuda())
    # TF32 is off by default for matmul but on for convolutions: three decimal digits.
    torch.testing.assert_close([o.cpu() for o in found], list(expected), rtol=1e-2, atol=1e-2)


def test_another_size_is_the_same_class_with_other_numbers():
    assert smallest().eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
