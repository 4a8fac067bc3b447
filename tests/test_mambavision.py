import copy
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import zoo.mambavision  # noqa: F401  (registers the names)
from zoo.deploy import deploy
from zoo.mambavision import RENAMES, MambaMixer, MambaVision, MixerStage, checkpoint_filter_fn
from zoo.weights import rename_key

WINDOWS = {
    "mambavision_t": (14, 7),
    "mambavision_l2": (14, 7),
    "mambavision_l2.in21k_ft_in1k_512": (32, 16),
    "mambavision_l3": (16, 8),
    "mambavision_l3.in21k_ft_in1k_512": (32, 16),
    "mamba_vision_B_21k": (14, 7),
    "mamba_vision_L2_512_21k": (32, 16),
    "mamba_vision_L3_256_21k": (16, 8),
    "mamba_vision_L3_512_21k": (32, 16),
}


def tiny(**kwargs):
    sizes = dict(depths=(1, 2, 3, 2), dim=8, num_heads=(2, 4), stem_dim=8)
    return MambaVision(**(sizes | dict(img_size=64, num_classes=10, layer_scale=0.5) | kwargs))


def lively(**kwargs):
    """A tiny model whose parts all matter: every parameter and statistic is drawn anew."""
    model = tiny(**kwargs)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "A_log" not in name:
                spread = 0.3 * torch.randn_like(value) / value[0].numel() ** 0.5
                value.copy_(1 + spread.abs() if name.endswith("var") else value + spread)
    return model.eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@cache
def on_meta(name):
    """The model that a name builds, without its memory."""
    with torch.device("meta"):
        return timm.create_model(name)


def taps(model, x):
    """Run `model` and keep what each of its parts gives, under the names of the golden data."""
    parts = {"stem": model.stem, "norm": model.norm, "pooled": model.head.global_pool}
    for i, stage in enumerate(model.stages):
        parts[f"stage{i}"], parts[f"down{i}"] = stage, stage.downsample
        parts |= {f"block{i}.{j}": block for j, block in enumerate(stage.blocks)}
    del parts["down3"]
    kept = {}
    hooks = [
        part.register_forward_hook(lambda _m, _x, y, name=name: kept.update({name: y}))
        for name, part in parts.items()
    ]
    kept["logits"] = model(x)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("card", ["mamba_vision_T", "mamba_vision_B"])
def test_the_published_networks_are_equal_at_every_tap(golden, card, dtype):
    model = timm.create_model(card).to(dtype)
    model.load_state_dict(golden.make_state_dict(card))
    report = golden.compare(model, card, run=taps, refill=False)
    assert report["ok"], report["worst"]
    for case, stored in golden.load_card(card)["cases"].items():
        assert report["cases"][case].keys() == set(stored["taps"])


@pytest.mark.slow
def test_published_weights_give_the_same_logits_under_our_name(golden):
    model = timm.create_model("mambavision_t").double()
    model.load_state_dict(golden.make_state_dict("mamba_vision_T"))
    report = golden.compare(model, "mamba_vision_T", run=taps, refill=False)
    assert report["ok"], report["worst"]
    assert not model.double_dt_bias


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba_vision_T", "mambavision_t"])
@pytest.mark.parametrize("wrap", ["state_dict", "model", None])
def test_timm_loads_a_published_file_by_its_roads(golden, tmp_path, name, wrap, caplog):
    state = {f"module.{k}": v for k, v in golden.make_state_dict("mamba_vision_T").items()}
    path = tmp_path / "published.pth.tar"
    torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    cfg = dict(file=str(path))
    pretrained = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg).eval()
    checkpoint = timm.create_model(name, checkpoint_path=str(path)).eval()
    x = golden.golden_input("normal", (2, 3, 224, 224))
    with torch.inference_mode():
        for model in (pretrained, checkpoint):
            rows = golden.compare_taps({"logits": model(x)}, "mamba_vision_T", "224")
            assert rows["logits"]["ok"], rows
    assert caplog.text.count("licensed for non-commercial use") == 2  # once for each


@pytest.mark.parametrize("card", ["mamba_vision_T", "mamba_vision_B"])
def test_the_renamed_keys_are_ours_with_their_shapes(golden, card):
    ours = {key: list(value.shape) for key, value in on_meta(card).state_dict().items()}
    published = golden.load_card(card)["state_dict"]
    renamed = {rename_key(key, RENAMES): shape for key, (shape, _) in published.items()}
    assert renamed == ours
    assert len(renamed) == len(published)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_published_state_dict_loads_strictly_with_any_prefix(prefix):
    model, other = lively(double_dt_bias=True), tiny(double_dt_bias=True).eval()
    back = {rename_key(k, RENAMES): k for k in published_keys(model)}
    state = {prefix + back[key]: value for key, value in model.state_dict().items()}
    other.load_state_dict(state)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    filtered = checkpoint_filter_fn({"state_dict": state}, other)
    assert filtered.keys() == model.state_dict().keys()


def published_keys(model):
    """The keys that the published code would give to a network like `model`."""
    for key in model.state_dict():
        key = key.replace("stages.", "levels.").replace("head.fc.", "head.")
        for i, j in enumerate((0, 3)):
            key = key.replace(f"stem.{i}.conv.", f"patch_embed.conv_down.{j}.")
            key = key.replace(f"stem.{i}.norm.", f"patch_embed.conv_down.{j + 1}.")
        for i in "12":
            key = key.replace(f".conv{i}.conv.", f".conv{i}.")
            key = key.replace(f".conv{i}.norm.", f".norm{i}.")
            key = key.replace(f".scale{i}.gamma", f".gamma_{i}")
        key = key.replace(".mixer.conv_", ".mixer.conv1d_")
        yield key.replace(".downsample.", ".downsample.reduction.0.")


def test_missing_and_extra_keys_are_errors():
    model = tiny()
    back = {rename_key(k, RENAMES): k for k in published_keys(model)}
    state = {back[key]: value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 missing: norm\.weight"):
        model.load_state_dict({k: v for k, v in state.items() if k != "norm.weight"})
    with pytest.raises(ValueError, match=r"1 extra: stages\.2\.blocks\.0\.strange"):
        model.load_state_dict(state | {"levels.2.blocks.0.strange": torch.zeros(1)})


def test_published_step_biases_are_corrected_on_the_way_in_and_ours_are_not():
    published, ours = lively(double_dt_bias=True), tiny().eval()
    back = {rename_key(k, RENAMES): k for k in published_keys(published)}
    theirs = {back[key]: value for key, value in published.state_dict().items()}
    ours.load_state_dict(theirs)
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-4, atol=1e-5)
    again = tiny().eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x))
    filtered = checkpoint_filter_fn(theirs, ours)
    assert all(torch.equal(filtered[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("steps", [True, False])
def test_the_step_bias_counts_twice_only_in_the_published_form(steps):
    mixer = MambaMixer(16, double_dt_bias=steps)
    other = MambaMixer(16, double_dt_bias=not steps)
    other.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        (mixer if steps else other).dt_proj.bias.div_(2)
    x = images(2, 9, 16)
    torch.testing.assert_close(other(x), mixer(x))


def test_steps_of_a_filled_up_rank_are_the_same():
    """On a GPU the rank of the step sizes is padded to a multiple of 8 channels."""
    mixer, x = MambaMixer(80), torch.randn(3, 7, 40, requires_grad=True)
    weights = [x, mixer.x_proj.weight, mixer.dt_proj.weight]
    found = []
    for pad in (0, 3):
        parts = mixer._steps(x, pad)
        assert [part.shape[-1] for part in parts] == [40, 8, 8]
        loss = sum(part.square().sum() for part in parts)
        found.append([*parts, *torch.autograd.grad(loss, weights)])
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def test_new_models_start_with_the_step_sizes_of_mamba_and_published_ones_at_bias_0():
    mixers = [m for m in tiny().modules() if isinstance(m, MambaMixer)]
    for mixer in mixers:
        steps = F.softplus(mixer.dt_proj.bias)
        assert ((steps > 0.999e-3) & (steps < 0.1001)).all()
    for mixer in tiny(double_dt_bias=True).modules():
        if isinstance(mixer, MambaMixer):
            assert not mixer.dt_proj.bias.any()


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_cover_the_map_at_the_size_of_the_weights(name):
    assert tuple(stage.window for stage in on_meta(name).stages[2:]) == WINDOWS[name]


def test_the_configuration_names_files_licence_and_layers():
    tagged = timm.list_models("*", module="mambavision", pretrained=True)
    assert len(tagged) == 22
    for name in tagged:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.license == "cc-by-nc-sa-4.0"
        assert cfg.hf_hub_id.startswith("nvidia/MambaVision-")
        assert cfg.hf_hub_filename.endswith(".pth.tar")
    large = timm.get_pretrained_cfg("mambavision_l2.in21k_ft_in1k_512")
    assert (large.crop_mode, large.crop_pct, large.input_size) == ("squash", 0.93, (3, 512, 512))
    model = tiny()
    assert isinstance(model.get_submodule(large.first_conv), nn.Conv2d)
    assert model.get_submodule(large.classifier) is model.get_classifier()


def test_the_window_may_be_chosen_and_nonsense_is_refused():
    model = tiny(window_size=(3, 2))
    assert [stage.window for stage in model.stages[2:]] == [3, 2]
    model.set_input_size((96, 200))
    assert [stage.window for stage in model.stages[2:]] == [13, 7]
    with pytest.raises(ValueError, match="at least one cell"):
        model.set_input_size(window_size=(4, 0))
    with pytest.raises(ValueError, match="give one of them"):
        model.set_input_size()
    with pytest.raises(ValueError, match="heads"):
        tiny(num_heads=(3, 4))
    with pytest.raises(TypeError, match="wimdow"):
        tiny(wimdow=3)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 96, 64), (1, 3, 50, 83), (3, 3, 32, 32)])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_every_size_runs_with_maps_of_the_promised_grids(shape, mask_padding):
    model = tiny(mask_padding=mask_padding).eval()
    assert model(images(*shape)).shape == (shape[0], 10)
    maps = model.forward_intermediates(images(*shape), intermediates_only=True)
    for info, level in zip(model.feature_info, maps, strict=True):
        grid = [-(-side // info["reduction"]) for side in shape[-2:]]
        assert level.shape == (shape[0], info["num_chs"], *grid)


def test_images_of_a_batch_and_their_windows_do_not_mix():
    model, x = lively(), images(3, 3, 80, 100)
    apart = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_masked_padding_leaves_the_tokens_as_if_they_were_alone(mask_padding):
    stage = lively(mask_padding=mask_padding, window_size=(8, 8)).stages[2]
    assert isinstance(stage, MixerStage)
    x = images(2, 32, 5, 8)  # three rows of padding below: the order of the others stays
    alone = x.flatten(2).transpose(1, 2)
    for block in stage.blocks:
        alone = block(alone)
    alone = alone.transpose(1, 2).unflatten(2, (5, 8))
    difference = (stage(x) - alone).abs().max()
    assert difference < 1e-4 if mask_padding else difference > 1e-2


"""The entry point's own sizes, replaced: what timm does with a name, in milliseconds."""


def test_the_deploy_form_is_equal_and_the_model_stays_whole():
    model = lively()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    deployed, x = deploy(model), images(2, 3, 72, 64)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-5, atol=1e-5)
    norms = [m for m in deployed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [deployed.norm]
    assert all(m.fused is not None for m in deployed.modules() if isinstance(m, MambaMixer))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(copy.deepcopy(deployed)(x), deployed(x))


def test_a_copy_after_a_training_step_loads_published_weights_too():
    model, published = tiny(), lively(double_dt_bias=True)
    model(images(2, 3, 64, 64)).sum().backward()
    twin = copy.deepcopy(model).eval()
    back = {rename_key(k, RENAMES): k for k in published_keys(published)}
    twin.load_state_dict({back[key]: value for key, value in published.state_dict().items()})
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(twin(x), published(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(twin.stem[0].conv.weight, model.stem[0].conv.weight)


def test_bfloat16_autocast_gives_finite_outputs_and_gradients():
    model = lively(mask_padding=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(2, 3, 72, 64))
        loss = y.float().square().mean()
    loss.backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
