"""Every registered name, and what timm's users do with a model: all families alike."""

import argparse
import copy
import logging
import pathlib
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import zoo
from zoo.deploy import deploy

MILLIONS = {  # parameters, as the published code builds them
    "eradio_l eradio eradio_large_fullres_ws16": 391.139,
    "eradio_xxxtiny": 10.513,
    "eradio_xxxtiny_8x_ws12": 6.516,
    "eradio_xxxtiny_8x_ws16": 6.533,
    "eradio_nano": 0.752,  # ours
    "fastervit_0 faster_vit_0_224": 31.405,
    "fastervit_1 faster_vit_1_224": 53.367,
    "fastervit_2 faster_vit_2_224": 75.924,
    "fastervit_3 faster_vit_3_224": 159.548,
    "fastervit_4 faster_vit_4_224": 365.556,
    "fastervit_5 faster_vit_5_224": 957.521,
    "fastervit_6 faster_vit_6_224": 1360.329,
    # Without the carriers' position embedding: their default resolutions are not square.
    "faster_vit_0_any_res": 30.609,
    "faster_vit_1_any_res": 52.044,
    "faster_vit_2_any_res": 74.339,
    "faster_vit_3_any_res": 156.384,
    "faster_vit_4_any_res": 360.720,
    "faster_vit_5_any_res": 949.638,
    "faster_vit_6_any_res": 1349.819,
    "fastervit_4_w14 faster_vit_4_21k_224 faster_vit_4_21k_224_any_res": 271.944,
    "fastervit_4_w24 faster_vit_4_21k_384 faster_vit_4_21k_384_any_res": 271.944,
    "fastervit_4_w32 faster_vit_4_21k_512 faster_vit_4_21k_512_any_res": 271.944,
    "fastervit_4_w48 faster_vit_4_21k_768 faster_vit_4_21k_768_any_res": 271.944,
    "mambavision_t mamba_vision_T": 31.794,
    "mambavision_t2 mamba_vision_T2": 35.104,
    "mambavision_s mamba_vision_S": 50.141,
    "mambavision_b mamba_vision_B mamba_vision_B_21k": 97.685,
    "mambavision_l mamba_vision_L mamba_vision_L_21k": 227.961,
    "mambavision_l2 mamba_vision_L2 mamba_vision_L2_512_21k": 241.555,
    "mambavision_l3 mamba_vision_L3_256_21k mamba_vision_L3_512_21k": 739.570,
    "radio_vit_base_patch16": 98.233,
    "radio_vit_large_patch16": 319.930,
    "radio_vit_so400m_patch16": 431.235,
    "radio_vit_huge_patch16": 651.643,
    "radio_vit_giant_patch16": 1159.619,
    "radio_vit_huge_patch14": 637.641,
    "radio_vit_giant_patch14": 1167.124,
}

COUNTS = {name: count for names, count in MILLIONS.items() for name in names.split()}
LIGHT = [names.split()[0] for names, count in MILLIONS.items() if count < 60]
"""Small enough to train as they are; of the others the same class is built with other numbers."""

FAMILIES = dict(
    eradio="eradio_nano",
    fastervit="fastervit_0",
    mambavision="mambavision_t",
    radio="radio_vit_base_patch16",
)

SMALL = dict(
    eradio=dict(depths=(1, 1, 2, 1), dim=8, num_heads=(2, 4), in_dim=8, neck_dim=16),
    fastervit=dict(depths=(1, 1, 2, 1), dim=16, num_heads=(2, 4), stem_dim=8, layer_scale=0.5),
    mambavision=dict(depths=(1, 1, 2, 2), dim=8, num_heads=(2, 4), stem_dim=8, layer_scale=0.5),
    radio=dict(depth=4, embed_dim=32, num_heads=2, reg_tokens=3, max_img_size=112, init_values=0.5),
)

MANY_WINDOWS = dict(  # that the maps of 64x96 pixels do not fill
    fastervit=dict(window_size=(2, 2), propagate=True), mambavision=dict(window_size=(4, 2))
)

IDLE_BIASES = re.compile(r"stages\.[01]\..*\.conv\.bias$|neck\.projections\.\d\.0\.conv\.bias$")
"""In front of a batch norm, which takes them off again: rounding alone makes their gradients."""


def family_of(name):
    return {"e": "eradio", "f": "fastervit", "m": "mambavision", "r": "radio"}[name[0]]


def create(name, **kwargs):
    """Build `name` to train: without drop path, which drops whole branches of a small batch."""
    radio = dict(pos_dropout=0.0) if family_of(name) == "radio" else {}
    return timm.create_model(name, drop_path_rate=0.0, **radio, **kwargs)


def step_of(name):
    """The smallest side that an image may have."""
    return int(found[1]) if (found := re.search(r"patch(\d+)", name)) else 32


def images(name, rows, cols, batch=2, chans=3):
    return torch.randn(batch, chans, rows * step_of(name), cols * step_of(name))


# -- every name ----------------------------------------------------------------------------------


def test_the_table_has_every_name():
    assert sorted(COUNTS) == zoo.list_models()


@pytest.mark.parametrize("name", COUNTS)
def test_every_name_has_the_published_number_of_parameters(name):
    kwargs = dict(weight_init="skip") if name.startswith("radio") else {}
    with torch.device("meta"):
        model = zoo.create_model(name, **kwargs)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_name_gives_the_maps_that_it_promises(name):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
        maps = model(images(name, 2, 3, batch=1))
    check_maps(model, maps, name)


def check_maps(model, maps, name):
    promised = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    sides = 2 * step_of(name), 3 * step_of(name)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, *(-(-side // stride) for side in sides)) for channels, stride in promised
    ]


def _small(name):
    # Windows of 32 and 48 cells stay, whatever the size of the rest.
    wide = re.search(r"vit_4.*(w32|w48|512|768)", name)
    marks = pytest.mark.slow if wide else ()
    return pytest.param(name, SMALL[family_of(name)], id=f"{name}-small", marks=marks)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*map(_small, COUNTS), *(pytest.param(name, {}, marks=pytest.mark.slow) for name in LIGHT)],
)
def test_every_name_trains_at_its_smallest_size(name, sizes):
    whole = dict(return_full_features=True) if name.startswith("eradio") else {}
    model = create(name, num_classes=5, **sizes, **whole).train()
    outputs = model(images(name, 1, 2))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(out.square().sum() for out in outputs).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in silent if not IDLE_BIASES.search(n)] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Two columns: oneDNN's strided bfloat16 convolution (AMX; torch 2.11, 2.15) reads what nobody
    # wrote where its result has one column and several rows.
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        rough = copy.deepcopy(model).eval().to(device)(images(name, 3, 2, batch=1).to(device))
    assert all(out.isfinite().all() for out in (rough if isinstance(rough, tuple) else (rough,)))
    maps = model.eval().forward_intermediates(images(name, 1, 1, batch=1), intermediates_only=True)
    assert all(m.shape[0] == 1 for m in maps)


# -- timm's contract, for one model of each family -----------------------------------------------


class Family:
    """A family's representative with small numbers, every branch of which shows in its output."""

    def __init__(self, key, golden):
        self.key, self.name, self.golden = key, FAMILIES[key], golden
        self.sizes = SMALL[key] | MANY_WINDOWS.get(key, {})

    def build(self, *, classes=5, **kwargs):
        model = create(self.name, num_classes=classes, **(self.sizes | kwargs))
        self.golden.fill(model.model if "features_only" in kwargs else model)
        return model.eval()

    def images(self, rows=2, cols=3, **kwargs):
        return images(self.name, rows, cols, **kwargs)

    def pool(self, features):
        return features.mean((2, 3)) if features.ndim == 4 else features[:, 0]


@pytest.fixture(params=FAMILIES)
def family(request, golden):
    return Family(request.param, golden)


def test_forward_is_features_then_pooling_then_classifier(family):
    model, x = family.build(), family.images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    torch.testing.assert_close(pooled, family.pool(features))
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    torch.testing.assert_close(model(x), model.forward_head(features))


def test_features_only_gives_what_forward_intermediates_gives(family):
    whole, x = family.build(), family.images()
    final, maps = whole.forward_intermediates(x)
    torch.testing.assert_close(final, whole.forward_features(x))
    for chosen in (None, (1, 3)):
        part = family.build(features_only=True, out_indices=chosen)
        check_maps(part, found := part(x), family.name)
        indices = [i["index"] for i in part.feature_info.get_dicts()]
        assert chosen is None or tuple(indices) == chosen
        torch.testing.assert_close(found, [maps[i] for i in indices])
    early = whole.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [maps[1]])
    _, last = whole.forward_intermediates(x, [3], norm=True)
    normed = final if final.ndim == 4 else final[:, 4:].transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(last, [normed])
    with pytest.raises(ValueError, match="NHWC"):
        whole.forward_intermediates(x, output_fmt="NHWC")


def test_without_a_classifier_the_pooled_features_come_out_and_without_a_pool_all(family):
    model, x = family.build(), family.images()
    features = model.forward_features(x)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), family.pool(features))
    torch.testing.assert_close(family.build(classes=0)(x), family.pool(features))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    torch.testing.assert_close(family.build(classes=0, global_pool="")(x), features)
    model.reset_classifier(3, "max" if features.ndim == 4 else "avg")
    assert model(x).shape == (2, 3) == (2, model.num_classes)
    assert model.get_classifier().out_features == 3


def test_images_of_one_channel_go_through_the_layers_that_the_configuration_names(family):
    model = family.build(in_chans=1)
    assert model(family.images(chans=1)).shape == (2, 5)
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


def test_saved_weights_load_by_name_and_give_the_same_output(family, tmp_path):
    model, x, path = family.build(), family.images(), tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    pretrained = dict(file=str(path), num_classes=5)
    for how in (
        dict(checkpoint_path=path),
        dict(pretrained=True, pretrained_cfg_overlay=pretrained),
    ):
        loaded = zoo.create_model(family.name, num_classes=5, **family.sizes, **how).eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_keys_that_do_not_fit_are_listed_ten_of_each_with_a_hint(family):
    model = family.build()
    state = {k: v for k, v in model.state_dict().items() if "norm" not in k}
    state |= {f"stray{i}": torch.ones(1) for i in range(3)}
    with pytest.raises(
        ValueError, match=r"missing: .* and \d+ more.*3 extra.*Is it a file"
    ) as caught:
        model.load_state_dict(state)
    assert len(str(caught.value)) < 1500
    loose = model.load_state_dict(state, strict=False)
    assert loose.unexpected_keys == ["stray0", "stray1", "stray2"]


def test_a_model_can_be_copied_after_a_training_step(family):
    model, x = family.build().train(), family.images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(model).eval()
    torch.testing.assert_close(twin(x), model.eval()(x), rtol=0, atol=0)
    assert not any(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_layer_decay_orders_every_parameter_from_stem_to_head(family):
    model = family.build()
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == {id(p) for p in model.parameters()}
    first = model.get_submodule(model.pretrained_cfg["first_conv"])
    trunk = (
        model.blocks if hasattr(model, "blocks") else [b for s in model.stages for b in s.blocks]
    )
    order = [next(part.parameters()) for part in (first, *trunk, model.get_classifier())]
    scales = [scale[id(p)] for p in order]
    assert scales == sorted(scales)
    assert scales[0] == min(scale.values()) < scales[-1] == max(scale.values()) == 1


def test_recomputing_the_blocks_changes_neither_gradients_nor_statistics(family):
    results, x = [], family.images()
    for enable in (False, True):
        model = family.build().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(x).square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((grads, model.state_dict()))
    torch.testing.assert_close(results[1], results[0])


def test_weight_decay_leaves_alone_what_it_would_harm(family):
    harmed = dict(
        eradio=r"position\.mlp",
        fastervit=r"pos_(embed|bias)\.mlp",
        mambavision=r"\.(A_log|D)$",
        radio=r"^(pos_embed|cls_token|reg_token)$",
    )[family.key]
    model = family.build()
    expected = {n for n, _ in model.named_parameters() if re.search(harmed, n)}
    assert expected
    assert expected <= model.no_weight_decay() <= expected | {"dist_token"}


def test_pruned_to_two_levels_the_maps_stay_the_same(family):
    model, x = family.build(), family.images()
    before = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    count = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    torch.testing.assert_close(
        model.forward_intermediates(x, [0, 1], intermediates_only=True), before
    )
    assert sum(p.numel() for p in model.parameters()) < 0.8 * count


def test_unknown_keywords_and_heads_that_do_not_fit_are_refused(family):
    with pytest.raises(TypeError, match="widow_size"):
        family.build(widow_size=7)
    with pytest.raises(TypeError, match="out_indices"):
        family.build(out_indices=(1,))
    heads = 5 if family.key == "radio" else (5, 5)
    with pytest.raises(ValueError, match="does not split into 5 heads; the nearest"):
        family.build(num_heads=heads)


def test_drop_path_rises_to_its_rate_and_acts_in_training_only(family):
    model = timm.create_model(family.name, drop_path_rate=0.4, num_classes=5, **family.sizes)
    family.golden.fill(model)
    rates = [p.drop_prob for p in model.modules() if type(p).__name__ == "DropPath"]
    assert rates[-1] == max(rates) == pytest.approx(0.4)
    assert len(set(rates)) >= 3
    x = family.images()
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    for part in model.modules():
        part.training = type(part).__name__ == "DropPath"
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_near_float32(family, autocast):
    model, x = family.build(), family.images()
    exact = model.forward_features(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not autocast:
            model, x = model.bfloat16(), x.bfloat16()
        rough = model.forward_features(x).float()
    assert (rough - exact).std() < 0.06 * exact.std()
    assert not rough.equal(exact)


def test_a_model_from_the_meta_device_computes_its_tables_again(family):
    model, x = family.build(), family.images()
    with torch.device("meta"):
        twin = copy.deepcopy(model).to("meta")
    twin = twin.to_empty(device="cpu")
    for part in twin.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


def test_the_deploy_form_is_equal_and_leaves_the_model_whole(family):
    model, x = family.build(), family.images()
    before = copy.deepcopy(model.state_dict())
    light = deploy(model)
    torch.testing.assert_close(light(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(light)(x), light(x), rtol=0, atol=0)
    norms = [n for n, part in light.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == ([] if family.key == "radio" else ["norm"])  # the pooled map's stays
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_twenty_steps_halve_the_loss(family):
    model = create(family.name, num_classes=4, **family.sizes).train()
    x, labels = family.images(2, 2, batch=8), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# -- weights: licences, plain data ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("eradio_l", 1),
        ("eradio_nano", 0),
        ("fastervit_0", 1),
        ("faster_vit_0_224", 1),
        ("mambavision_t.in1k", 1),
        ("radio_vit_base_patch16.radio_v2_5", 1),
        ("radio_vit_base_patch16.c_radio_v3", 0),
    ],
)
def test_loading_weights_for_research_says_so_once(name, warned, tmp_path, caplog):
    small = SMALL[family_of(name)]
    torch.save(timm.create_model(name, **small).state_dict(), tmp_path / "w.pth")
    overlay = dict(file=str(tmp_path / "w.pth"))
    with caplog.at_level(logging.WARNING, "zoo"):
        timm.create_model(name, **small)
        assert caplog.text == ""
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **small)
    assert caplog.text.count("licensed for non-commercial use") == warned


def test_every_tag_of_other_peoples_weights_names_its_licence():
    for name in zoo.list_models():
        for tagged in timm.list_pretrained(f"{name}.*"):
            assert timm.get_pretrained_cfg(tagged).license in (
                "cc-by-nc-sa-4.0",
                "nscl-nc",
                "nvidia-open-model-license",
                "nvidia-source-code-nc",
            ), tagged


def test_a_checkpoint_may_hold_plain_data_which_timm_alone_refuses(family, tmp_path):
    args = argparse.Namespace(output=pathlib.Path("/runs"), lr=np.float64(0.1))
    model = timm.create_model(family.name, **family.sizes)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / "last.pth.tar")
    how = dict(family.sizes, checkpoint_path=tmp_path / "last.pth.tar")
    with pytest.raises(RuntimeError, match="blocked"):
        timm.create_model(family.name, **how)
    before = set(map(str, torch.serialization.get_safe_globals()))
    loaded = zoo.create_model(family.name, **how)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# -- compile and export --------------------------------------------------------------------------


@pytest.mark.long
def test_the_model_compiles_as_one_graph(family):
    model, x = family.build(), family.images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    model.train()
    compiled(x).sum().backward()
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).weight.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_one_compiled_graph_serves_any_batch(family, training):
    model, graphs = family.build().train(training), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    for batch in (2, 3, 5):
        x = family.images(batch=batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert len(compiled(x)) == batch
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_compiled_training_step_keeps_channels_last(family):
    """Any other map or gradient that came to a convolution would be copied by it."""
    if family.name.startswith("radio"):
        pytest.skip("a ViT's one convolution gets its gradient from among other tokens")
    turned, names = [], []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            name = str(node.target)
            if name.startswith(("aten.convolution.", "aten.convolution_backward.")):
                maps = [arg.meta["val"] for arg in node.args[: 2 if "backward" in name else 1]]
                names.append(name)
                turned.extend(
                    (name, tuple(m.shape), m.stride())
                    for m in maps
                    if not m.is_contiguous(memory_format=torch.channels_last)
                )
        return make_boxed_func(graph.forward)

    model = family.build().train().to(memory_format=torch.channels_last)
    backend = aot_autograd(
        fw_compiler=record, bw_compiler=record, decompositions=select_decomp_table()
    )
    x = family.images(2, 2)  # E-RADIO enlarges maps of other sides by torch's own interpolation
    x = x.contiguous(memory_format=torch.channels_last)
    torch.compile(model, fullgraph=True, dynamic=False, backend=backend)(x).sum().backward()
    assert any("backward" in name for name in names)
    assert not turned


BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.mark.slow
def test_an_exported_program_takes_any_batch(family):
    model = family.build()
    program = torch.export.export(model, (family.images(),), dynamic_shapes=BATCH).module()
    for batch in (1, 2, 5):
        x = family.images(batch=batch)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter and its dependencies warn about themselves
def test_onnxruntime_agrees_for_any_batch(family, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = family.build(), tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (family.images(),),
        path,
        dynamo=True,
        opset_version=18,
        input_names=["images"],
        dynamic_shapes=BATCH,
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = family.images(batch=batch)
        (logits,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)
