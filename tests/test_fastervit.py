"""FasterViT against its golden data, its paper's table and what timm's users rely on."""

import ast
import copy
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from zoo import fastervit
from zoo.deploy import deploy
from zoo.fastervit import (
    COMPUTED,
    RENAMES,
    SIZES,
    Carriers,
    CarrierStart,
    FasterViT,
    _spread,
)
from zoo.layers.position import CarrierBias, GridEmbedding
from zoo.weights import rename_key

CARDS = sorted(p.stem for p in (Path(__file__).parent / "golden").glob("faster_vit_*.json"))


TINY = dict(depths=(1, 1, 2, 1), dim=16, stem_dim=8, num_heads=(2, 4), num_classes=10)
SCALED = dict(layer_scale=0.5, propagate=True)


def tiny(**kwargs) -> FasterViT:
    """A FasterViT of 0.7 M parameters whose position biases and norms are far from their start."""
    model = timm.create_model("fastervit_0", **(TINY | kwargs))
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if (
            re.search(r"pos_(embed|bias)\.mlp|norm|scale|running_mean", name)
            and value.is_floating_point()
        ):
            nn.init.normal_(value, mean=float(value.detach().mean()), std=0.3)
    return model.eval()


def taps_of(model, x):
    """Run the model and keep what the golden data keeps."""
    taps, hooks = {}, []

    def keep(part, name):
        def hook(_, __, out):
            taps[name] = out

        hooks.append(part.register_forward_hook(hook))

    def keep_block(stage, block, name):  # of networks that do not propagate
        def hook(_, __, out):
            cells = stage.window**2
            carriers, taps[name] = out[:, :-cells], out[:, -cells:]
            if carriers.numel():
                taps[f"{name}.carrier"] = carriers.reshape(len(x), -1, carriers.shape[-1])

        hooks.append(block.register_forward_hook(hook))

    keep(model.stem, "stem")
    keep(model.norm, "norm")
    keep(model.head.global_pool, "pooled")
    for i, stage in enumerate(model.stages):
        keep(stage, f"stage{i}")
        if i < 3:
            keep(stage.downsample, f"down{i}")
        if getattr(stage, "tokenizer", None) is not None:
            keep(stage.tokenizer, f"carrier{i}")
        for j, block in enumerate(stage.blocks):
            (partial(keep_block, stage) if i >= 2 else keep)(block, f"block{i}.{j}")
    taps["logits"] = model(x)
    if "carrier2" in taps:
        taps["carrier2"] = taps["carrier2"].reshape(len(x), -1, taps["carrier2"].shape[-1])
    for hook in hooks:
        hook.remove()
    return taps


@pytest.fixture(scope="module", params=CARDS)
def card(request, golden):
    """A card's name and its model, filled by the rule through the published keys."""
    call = ast.parse(golden.load_card(request.param)["call"], mode="eval").body
    kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    model = timm.create_model(call.func.id, **kwargs)
    model.load_state_dict(golden.make_state_dict(request.param))
    return request.param, model


# Equal to the published networks


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_golden_tap_is_reproduced(card, golden, dtype):
    name, model = card
    report = golden.compare(model.to(dtype), name, run=taps_of, refill=False)
    assert report["ok"], report["worst"]
    for case, rows in report["cases"].items():
        assert set(rows) == set(golden.load_case(name, case))


@pytest.mark.slow
def test_published_and_own_keys_correspond_one_to_one(card, golden):
    name, model = card
    published = golden.make_state_dict(name)
    renamed = [rename_key(k, RENAMES) for k in published if not re.search(COMPUTED, k)]
    own = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
    assert sorted(renamed) == sorted(own)
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"1?\d+ missing: stages\.3\.blocks\.0"):
        model.load_state_dict({k: v for k, v in published.items() if "levels.3.blocks.0" not in k})
    with pytest.raises(ValueError, match=r"1 extra: stages\.3\.blocks\.0\.extra"):
        model.load_state_dict(published | {"levels.3.blocks.0.extra": torch.zeros(1)})
    model.load_state_dict(state)


@pytest.mark.slow
def test_the_published_carrier_swap_is_a_flag_and_changes_the_logits_a_little(golden):
    name = "faster_vit_0_any_res"
    model = timm.create_model(name, resolution=[256, 384])
    model.load_state_dict(golden.make_state_dict(name))
    model.double().eval()
    published = golden.load_case(name, "256x384")["logits"]["full"]
    x = golden.golden_input("normal", (2, 3, 256, 384)).double()
    with torch.no_grad():
        swapped = model(x)
        for block in model.stages[2].blocks:
            block.carriers.swapped = False
        fixed = model(x)
    torch.testing.assert_close(swapped, torch.from_numpy(published), atol=1e-6, rtol=0)
    assert 4e-5 < (fixed - swapped).abs().max() < 2e-4  # 8e-5 is reported for the reference


def test_every_published_name_is_registered_with_its_weights_and_licence():
    for size in SIZES:
        for name in fastervit._published_names(size):
            cfg = timm.get_pretrained_cfg(name)
            assert cfg.hf_hub_id == "ahatamiz/FasterViT"
            assert cfg.license == "nvidia-source-code-nc"
    assert timm.get_pretrained_cfg("fastervit_4_w24").hf_hub_filename.endswith("384_w24.pth.tar")
    assert timm.get_pretrained_cfg("fastervit_4_w24").tag == "in21k_ft_in1k_384"
    assert timm.get_pretrained_cfg("faster_vit_2_any_res").input_size == (3, 541, 960)
    assert timm.get_pretrained_cfg("fastervit_0.in1k").crop_pct == 0.875


# Carriers


def test_the_published_form_at_a_square_size_is_the_corrected_one():
    theirs = tiny(img_size=200, published_carriers=True, **SCALED)
    ours = tiny(**SCALED).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 200, 200)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_the_published_form_has_an_embedding_only_for_square_grids_and_carriers_only_for_many():
    def parts(img_size):
        keys = tiny(img_size=img_size, published_carriers=True).state_dict()
        return any("carriers." in k for k in keys), any("carriers.pos_embed" in k for k in keys)

    assert parts(224) == (True, True)
    assert parts((96, 224)) == (True, False)
    assert parts(112) == (False, False)


def identity_carriers(**kwargs) -> Carriers:
    part = Carriers(8, 2, (4, 6), embed=False, layer_scale=None, drop_path=0.0, **kwargs)
    for linear in (part.layer.mixer.proj, part.layer.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return part


def test_carriers_come_back_to_their_own_windows_unless_swapped():
    x = torch.randn(2 * 6, 4, 8)
    straight, swapped = (identity_carriers(published=published) for published in (False, True))
    assert torch.equal(straight(x, 2, 3, None, straight.pos_bias((4, 6))), x)
    assert not torch.equal(swapped(x, 2, 3, None, swapped.pos_bias((4, 6))), x)
    assert torch.equal(swapped(x[:8], 2, 2, None, swapped.pos_bias((4, 4))), x[:8])


def test_the_square_table_leaves_the_first_carriers_without_bias():
    square = CarrierBias(2, 4, 6, square=True)
    bias = square((4, 6))
    assert bias.shape == (2, 24, 24)
    assert not bias[:, :8].any() and not bias[:, :, :8].any()
    torch.testing.assert_close(bias[:, 8:, 8:], square((4, 4)))
    whole = CarrierBias(2, 4, 6, square=False)
    whole.load_state_dict(square.state_dict())
    torch.testing.assert_close(whole((4, 4)), square((4, 4)))
    assert (whole((4, 6)) > 0).all()


def test_carriers_start_as_overlapping_means_in_window_order():
    part = CarrierStart(3)
    x = torch.randn(2, 3, 14, 21)
    ours = part(x, 2, 3).view(2, 2, 3, 2, 2, 3)
    conv = part.conv(x)
    for row, col in [(0, 0), (3, 5), (1, 2), (2, 3)]:
        # 14 -> 4: steps of 3, kernel 5; 21 -> 6: steps of 3, kernel 6.
        mean = conv[:, :, 3 * row : 3 * row + 5, 3 * col : 3 * col + 6].mean((2, 3))
        torch.testing.assert_close(ours[:, row // 2, col // 2, row % 2, col % 2], mean)


def test_carriers_spread_to_the_nearest_cells_of_their_window():
    carriers = torch.arange(4.0)[None, :, None].expand(1, 4, 4)
    cells = _spread(carriers, 7)[0, :, 0].view(7, 7)
    near = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    assert torch.equal(cells, (2 * near[:, None] + near[None, :]).float())


def test_tables_of_an_unprepared_grid_equal_those_of_a_prepared_one():
    for part in (GridEmbedding(6, 4, 4), CarrierBias(2, 4, 4, square=False)):
        on_the_fly = part((4, 6))
        part.set_grid(4, 6)
        assert torch.equal(part((4, 6)), on_the_fly)


# Any size


@pytest.mark.parametrize("size", [(224, 224), (33, 47), (96, 256), (130, 70), (448, 64)])
def test_our_names_run_at_any_size(size):
    maps = timm.create_model("fastervit_0", features_only=True, **TINY)(torch.randn(1, 3, *size))
    for x, channels, reduction in zip(maps, (16, 32, 64, 128), (4, 8, 16, 32), strict=True):
        assert x.shape == (1, channels, *(-(-side // reduction) for side in size))


def test_published_names_run_at_other_sizes_than_they_were_built_for():
    model = timm.create_model("faster_vit_0_any_res", resolution=[96, 224], **TINY)
    assert model(torch.randn(1, 3, 64, 320)).shape == (1, 10)


def test_masked_cells_change_nothing_in_real_ones():
    model = tiny(mask_padding=True, **SCALED)
    block = model.stages[2].blocks[1]
    real = torch.zeros(2, 49, dtype=torch.bool)
    real[0, :30], real[1, :9] = True, True
    padding = torch.zeros(2, 49).masked_fill(~real, -torch.inf).view(2, 1, 1, 49)
    visible = torch.cat([torch.ones(2, 4, dtype=torch.bool), real], dim=1).repeat(
        2, 1
    )  # carriers are
    x = torch.randn(4, 4 + 49, 64)
    other = torch.where(visible[..., None], x, torch.randn_like(x))
    with torch.no_grad():
        _, positions, *_ = model.stages[2].positions(1, 2)
        ours = block(x, (1, 2), padding, positions)
        theirs = block(other, (1, 2), padding, positions)
        unmasked = block(other, (1, 2), None, positions)
    torch.testing.assert_close(ours[visible], theirs[visible])
    assert (unmasked - theirs)[visible].abs().max() > 1e-3


def test_masking_matters_only_where_windows_are_filled_up():
    masked, plain = tiny(mask_padding=True), tiny()
    plain.load_state_dict(masked.state_dict())
    whole, padded = torch.randn(2, 3, 224, 448), torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(masked(whole), plain(whole))
        assert (masked(padded) - plain(padded)).abs().max() > 1e-3
        assert masked(padded).isfinite().all()


def test_set_input_size_moves_tables_and_windows_but_no_parameters():
    model = tiny(img_size=(96, 160))
    model.set_input_size((128, 256))
    assert model.stages[2].blocks[0].carriers.pos_bias.grid == (4, 6)
    x = torch.randn(2, 3, 128, 256)
    fresh = tiny(window_size=(4, 2))
    fresh.load_state_dict(model.state_dict())
    before = set(model.state_dict())
    model.set_input_size(window_size=(4, 2))
    assert set(model.state_dict()) == before
    with torch.no_grad():
        torch.testing.assert_close(model(x), fresh(x))


@pytest.mark.parametrize("size", [(32, 32), (96, 160)])
@pytest.mark.parametrize("kwargs", [{}, SCALED, dict(carriers=False)], ids=["0", "3", "flat"])
def test_every_parameter_gets_a_gradient(kwargs, size):
    # Without drop path, which drops whole branches of a batch this small.
    model = timm.create_model("fastervit_0", **(TINY | dict(drop_path_rate=0.0) | kwargs)).train()
    model(torch.randn(2, 3, *size)).square().mean().backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias in front of a batch norm has no effect; rounding alone decides whether it is zero.
    assert not [n for n in lost if not re.search(r"conv[12]\.conv\.bias$", n)]


# Checkpoints


@pytest.mark.slow
def test_a_wrapped_published_file_loads_through_timm(golden, tmp_path):
    published = golden.make_state_dict("faster_vit_0_224")
    published["levels.2.blocks.0.pos_embed.relative_bias"] = torch.zeros(1, 49, 256)
    published["levels.2.blocks.0.attn.pos_emb_funct.relative_position_index"] = torch.zeros(49, 49)
    path = tmp_path / "fastervit_0_224_1k.pth.tar"
    wrapped = {f"module.encoder.{k}": v for k, v in published.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, path)
    overlay = dict(file=str(path))
    model = timm.create_model("fastervit_0", pretrained=True, pretrained_cfg_overlay=overlay)
    direct = timm.create_model("fastervit_0")
    direct.load_state_dict(published)
    for key, value in direct.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    grey = timm.create_model(
        "fastervit_0", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1
    )
    assert grey.stem[0].conv.weight.shape[1] == 1
    assert torch.equal(
        grey.stages[3].blocks[0].layer.norm1.weight, model.stages[3].blocks[0].layer.norm1.weight
    )


def test_a_network_without_room_for_carrier_weights_says_that_it_leaves_them_out(caplog):
    published = {
        "levels.2.blocks.0.hat_pos_embed.cpb_mlp.0.weight": torch.zeros(512, 2),
        "levels.2.blocks.0.norm1.weight": torch.zeros(64),
    }
    any_res = tiny(img_size=(96, 224), published_carriers=True)
    assert set(any_res.translate(published)) == {"stages.2.blocks.0.layer.norm1.weight"}
    assert "1 weights of carriers are left out" in caplog.text
    assert len(tiny().translate(published)) == 2


# The deploy form


@pytest.mark.parametrize("published", [False, True])
def test_the_deploy_form_gives_the_same_numbers_without_computing_positions(published):
    model = tiny(img_size=(96, 224), published_carriers=published, **SCALED)
    fast = deploy(model)
    x, other = torch.randn(2, 3, 96, 224), torch.randn(2, 3, 160, 96)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fast(other), model(other), atol=1e-5, rtol=1e-5)
        for part in fast.modules():
            if isinstance(part, nn.Sequential) and isinstance(part[0], nn.Linear):
                part[0].weight.fill_(torch.nan)  # the networks of positions
        torch.testing.assert_close(copy.deepcopy(fast)(x), model(x), atol=1e-5, rtol=1e-5)
    norms = [n for n, part in fast.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == ["norm"]
