"""A cut model is its masked parent, of its library's own class, and reloads to the same bits."""

import copy
import subprocess
import sys

import pytest
import timm
import torch

from zoo.axes import named_shapes
from zoo.students.prune.cut import keep_layers, keep_units
from zoo.students.prune.layers import block_influence
from zoo.students.prune.library import NotExpressible, Parent, save
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import LIMIT
from zoo.students.prune.prune import prune
from zoo.students.prune.score import activation, contribution, magnitude, unit_scores

LANGUAGE = ("ffn=0.75", "heads=0.5", "groups=0.5", "stream=0.5,ffn=0.5,heads=0.5,groups=0.5")
MAMBA = ("ssm_heads=0.5", "ssm_channels=0.5", "ssm_state=0.5", "stream=0.5,ssm_heads=0.5")
STREAM = ("ffn=0.75", "stream=0.5,ffn=0.5")
PLANS = {
    **dict.fromkeys(("vit", "vit_reg", "vit_swiglu", "vit_map", "eva02", "eva02_base"), STREAM),
    **dict.fromkeys(("dinov3", "swin", "swinv2", "radio", "siglip_vision", "clip"), STREAM),
    **dict.fromkeys(("siglip", "dinov2", "bert", "llava"), STREAM),
    **dict.fromkeys(("convnext", "convnextv2", "fastervit", "mambavision"), ("stream=0.5",)),
    **dict.fromkeys(("eradio", "eradio_light"), ("stream=0.5,ffn=0.5",)),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma3", "nemotron"), LANGUAGE),
    **dict.fromkeys(("mixtral", "qwen3_moe"), (*LANGUAGE, "experts=0.5")),
    "laguna": (*LANGUAGE, "experts=0.5", "shared=0.5", "layers=1"),
    "mamba2": MAMBA,
    "hyena": (
        *("ffn=0.75", "heads=0.5", "ssm_channels=0.5", "ssm_state=0.5", "*.operator.g=0.5"),
        *("stream=0.5,ffn=0.5,heads=0.5,ssm_channels=0.75", "layers=2"),
    ),
    "nemotron_h": (*LANGUAGE, *MAMBA, "experts=0.5", "shared=0.5", "layers=3"),
    "falcon_h1": (*LANGUAGE, *MAMBA, "layers=1"),
    "granite_hybrid": (
        *("ffn=0.75", "stream=0.5", "stream=0.5,ffn=0.5", "experts=0.5", "shared=0.5", "layers=1"),
        *("ssm_heads=0.5", "ssm_channels=0.5", "ssm_state=0.5"),
    ),
    "zamba2": (
        *("ffn=0.75", "stream=0.5", "stream=0.5,ffn=0.5"),
        *("ssm_heads=0.5", "ssm_channels=0.5", "ssm_state=0.5"),
    ),
}


def parent_of(tiny, names) -> Parent:
    return Parent(tiny.model, *names.get(tiny.name, ()))


def scores(tiny, plan):
    """Score by activations; by weights where no product reads an axis."""
    sizes = plan.sizes(tiny.shapes)
    columns = activation(tiny.model, tiny.shapes, [tiny.inputs], sizes) if sizes else {}

    def score(axis):
        try:
            return unit_scores(columns, tiny.shapes, axis)
        except ValueError:
            return magnitude(tiny.shapes, tiny.state, axis), ()

    return score


@pytest.mark.parametrize(("name", "words"), [(n, w) for n, plans in PLANS.items() for w in plans])
def test_a_child_is_its_masked_parent_and_reloads_to_the_same_bits(
    name, words, build, timm_names, tmp_path
):
    tiny, plan = build(name), Plan.parse(words)
    child = prune(parent_of(tiny, timm_names), plan, scores(tiny, plan), probe=tiny.inputs)
    assert child.shapes.count() < tiny.shapes.count()
    assert child.proof is None or child.proof.moved < 5e-6 * child.proof.control
    assert (child.proof is None) == ("layers" in words)
    save(child.built, tmp_path / "child")
    again = open_parent(str(tmp_path / "child")).model
    ours, theirs = child.built.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].to(theirs[key]), theirs[key]) for key in ours)
    assert named_shapes(again).tied == child.shapes.tied


def test_layers_of_other_widths_load_with_transformers_alone(build, tmp_path):
    """Laguna has the number of heads of each layer in its configuration."""
    from transformers import AutoModelForCausalLM

    tiny = build("laguna")
    plan = Plan.parse("model.layers.1.self_attn.q=1,ffn=0.75")
    child = prune(Parent(tiny.model), plan, scores(tiny, plan), probe=tiny.inputs).built
    save(child, tmp_path)
    own = dict(attn_implementation="eager", experts_implementation="eager")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, **own)
    assert type(again).__module__.startswith("transformers.")
    assert again.config.num_attention_heads_per_layer == [4, 2]
    assert [layer.self_attn.q_proj.out_features for layer in again.model.layers] == [32, 16]
    aligned = copy.deepcopy(again)  # a file's tensors are not: on some CPUs the last bits show it
    with torch.no_grad():
        ours, theirs = (model(**tiny.inputs).logits for model in (child.model, aligned))
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_children_load_without_zoo(build, timm_names, tmp_path):
    for name in ("vit", "bert"):
        tiny, plan = build(name), Plan.parse("stream=0.5,ffn=0.5")
        child = prune(parent_of(tiny, timm_names), plan, scores(tiny, plan))
        save(child.built, tmp_path / name)
    code = (
        "import sys, timm\n"
        f"m = timm.create_model('local-dir:{tmp_path}/vit', pretrained=True)\n"
        "assert m.embed_dim == 12 and m.blocks[0].attn.num_heads == 2\n"
        "from transformers import AutoModel\n"
        f"m = AutoModel.from_pretrained('{tmp_path}/bert')\n"
        "assert m.config.hidden_size == 12 and m.config.intermediate_size == 24\n"
        "assert 'zoo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


REFUSED = [
    ("vit", "heads=0.5", NotExpressible, r"attn\.qkv\.weight should be \(36, 24\).*together"),
    ("vit", "stream=0.5,heads=3", NotExpressible, "VisionTransformer"),
    ("vit", "*.attn.d=0.5", ValueError, r"blocks\.0\.attn\.d keeps its size: scale"),
    ("llama", "*.self_attn.d=0.5", ValueError, "keeps its size: rope"),
    ("llama", "model.layers.0.mlp.f=0.5", NotExpressible, "intermediate_size is one number"),
    ("llama", "heads=3", ValueError, "heads=3 keeps more than the 2 there are"),
    ("gemma3", "stream=15", NotExpressible, "Gemma3ForCausalLM cannot be built"),
    ("mixtral", "experts=1", NotExpressible, "each token to 2 experts cannot have 1"),
    ("mamba2", "stream=0.75", NotExpressible, r"expand is a whole number.*not 2\.6667"),
    ("dinov2", "ffn=0.7", NotExpressible, "mlp_ratio is a whole number"),
    (
        "granite_hybrid",
        "heads=0.5",
        NotExpressible,
        r"\(32, 32\) where.*q_proj\.weight should be \(16",
    ),
    ("zamba2", "groups=0.5", NotExpressible, r"linear_q_adapter_list\.0\.1\.weight should be"),
    ("zamba2", "*.shared_transformer.self_attn.d=0.5", ValueError, "keeps its size: rope"),
    ("nemotron_h", "layers=1", NotExpressible, r"none is attention.*keep one of \[1\]"),
    ("resnet", "stream=0.5", NotExpressible, r"ResNet has \(64, 3, 7, 7\) where conv1"),
    ("vit", "experts=2", ValueError, "This model has no 'experts'; it has stream, ffn, heads"),
    ("vit", "flop=0.5", ValueError, "Did you mean flops"),
    ("vit", "visoin.ffn=0.5", ValueError, "Did you mean vision.ffn"),
    ("vit", "layers=1.0", ValueError, "cuts nothing"),
]


@pytest.mark.parametrize(("name", "words", "kind", "message"), REFUSED)
def test_what_a_library_cannot_build_is_refused_by_name(
    name, words, kind, message, build, timm_names
):
    tiny = build(name)
    with pytest.raises(kind, match=message):
        plan = Plan.parse(words)
        prune(parent_of(tiny, timm_names), plan, scores(tiny, plan))


def test_a_shared_block_is_cut_once_and_keeps_its_place_when_layers_go(build):
    zamba = build("zamba2")
    child = prune(Parent(zamba.model), Plan.parse("ffn=0.5"), scores(zamba, Plan.parse("ffn=0.5")))
    blocks = [child.built.model.model.layers[i].shared_transformer for i in (1, 4)]
    assert blocks[0].feed_forward.down_proj.weight is blocks[1].feed_forward.down_proj.weight

    def kept(*layers):  # 1, 2 and 4 run a shared block
        return lambda _, count: torch.tensor([float(i in layers) for i in range(count)])

    child = prune(
        Parent(zamba.model), Plan.parse("layers=4"), None, rank_layers=kept(0, 1, 2, 4)
    ).built.model
    assert child.config.hybrid_layer_ids == [1, 2, 3]
    without = copy.deepcopy(zamba.model)
    without.model.layers[3].forward = lambda hidden_states, *_, **__: hidden_states
    ids = torch.tensor([[3, 9, 4, 11, 7]])
    with torch.no_grad():
        expected, found = without(ids, use_cache=False).logits, child(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    with pytest.raises(NotExpressible, match=r"layers \[4\] run a shared block"):
        prune(Parent(zamba.model), Plan.parse("layers=4"), None, rank_layers=kept(0, 1, 2, 3))


@pytest.mark.parametrize("words", ["ffn", "ffn=1.5", "ffn=0", "", "ffn=x"])
def test_words_that_say_nothing_to_keep_are_refused(words):
    with pytest.raises(ValueError, match=r"what=share|Nothing is to be cut"):
        Plan.parse(words)


@pytest.mark.parametrize("name", ["vit", "eva02", "swinv2", "mixtral", "nemotron_h", "mambavision"])
def test_scores_are_the_same_however_samples_are_cut_into_batches(name, build):
    tiny = build(name)
    key, value = next(iter(tiny.inputs.items()))
    value = torch.cat([value, value.flip(-1), value.roll(1, -1), value.roll(2, -1)])
    axes = [a for a in tiny.shapes.sizes if tiny.shapes.readers(a)]
    whole = activation(tiny.model, tiny.shapes, [{key: value}], axes)
    for sizes in ([1] * 8, [3, 3, 2]):
        parts = [{key: part} for part in value.split(sizes)]
        again = activation(tiny.model, tiny.shapes, parts, axes)
        assert whole.keys() == again.keys()
        for weight in whole:
            near = 1e-9 if name == "nemotron_h" else 1e-12  # its norms are float32 in float64
            torch.testing.assert_close(again[weight], whole[weight], rtol=near, atol=near)


def test_the_activation_score_is_the_norm_over_samples_of_the_mean_over_tokens(build):
    vit, seen = build("vit"), []
    hook = vit.model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    columns = activation(vit.model, vit.shapes, [vit.inputs], ["blocks.0.mlp.f"])
    hook.remove()
    expected = seen[-1].abs().mean(1).square().sum(0).sqrt()  # others come before it
    found, by = unit_scores(columns, vit.shapes, "blocks.0.mlp.f")
    torch.testing.assert_close(found, expected)
    assert by == ()
    weighed, _ = unit_scores(
        contribution(columns, vit.shapes, vit.state), vit.shapes, "blocks.0.mlp.f"
    )
    torch.testing.assert_close(weighed, expected * vit.model.blocks[0].mlp.fc2.weight.norm(dim=0))


def test_query_heads_are_chosen_in_each_group_and_channels_in_each_head(build):
    for name, axis, sizes in [
        ("llama", "model.layers.0.self_attn.q", (2, 2)),
        ("mamba2", "backbone.layers.0.mixer.p", (2, 4, 8)),
        ("mixtral", "model.layers.0.mlp.f", (4, 48)),
    ]:
        tiny = build(name)
        columns = activation(tiny.model, tiny.shapes, [tiny.inputs], [axis])
        assert unit_scores(columns, tiny.shapes, axis)[0].shape == sizes


def test_an_axis_that_no_product_reads_has_no_activation_score(build):
    mamba = build("mamba2")
    with pytest.raises(ValueError, match=r"No weight reads axis .*mixer\.s.*--score magnitude"):
        unit_scores({}, mamba.shapes, "backbone.layers.0.mixer.s")
    with pytest.raises(ValueError, match="there are no samples"):
        activation(mamba.model, mamba.shapes, [], ["C"])


@pytest.mark.parametrize(
    ("name", "axis", "by"),
    [
        ("mamba2", "mixer.p", ("g", "r")),
        ("mamba2", "mixer.r", ("g",)),
        ("mamba2", "mixer.s", ("g",)),
        ("mixtral", "mlp.f", ("e",)),
        ("llama", "self_attn.q", ("k",)),
    ],
)
def test_units_may_change_places_on_their_own_in_each_outer_unit(name, axis, by, build):
    tiny = build(name)
    (axis,) = (a for a in tiny.shapes.sizes if a.endswith("layers.0." + axis))
    outer = tuple(f"{axis.rpartition('.')[0]}.{letter}" for letter in by)
    sizes = [tiny.shapes.sizes[o] for o in outer]
    draws = torch.Generator().manual_seed(3)
    order = torch.rand(*sizes, tiny.shapes.sizes[axis], generator=draws).argsort(-1)
    assert not (order == order.flatten(0, -2)[0]).all()
    before = tiny.forward(tiny.state)[0]
    state, _ = keep_units(tiny.shapes, tiny.state, axis, order, outer)
    moved = (tiny.forward(state)[0] - before).abs().max()
    name = tiny.shapes.readers(axis)[0].param if tiny.shapes.readers(axis) else "conv1d.weight"
    broken = state | {n: tiny.state[n] for n in state if n.endswith(name) and "layers.0" in n}
    control = (tiny.forward(broken)[0] - before).abs().max()
    assert moved < LIMIT * control


def test_a_choice_that_a_tensor_cannot_follow_is_refused(build):
    llama = build("llama")
    q, k = "model.layers.0.self_attn.q", "model.layers.0.self_attn.k"
    with pytest.raises(ValueError, match=r"chosen by nothing have the shape \['units'\]"):
        keep_units(llama.shapes, llama.state, q, torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match=r"units 0 to 1; these are not: \[2\]"):
        keep_units(llama.shapes, llama.state, q, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"has .* but not"):
        keep_units(llama.shapes, llama.state, "C", torch.zeros(2, 4).long(), (k,))
    with pytest.raises(ValueError, match="There is no axis 'z'"):
        keep_units(llama.shapes, llama.state, "z", torch.tensor([0]))
    with pytest.raises(ValueError, match=r"Layers \[7\] of 'model.layers' cannot be kept"):
        keep_layers(llama.shapes, llama.state, "model.layers", [7])


@pytest.mark.parametrize(
    "name", ["vit", "llama", "convnext", "mambavision", "bert", "nemotron_h", "hyena"]
)
def test_layers_go_and_the_rest_keeps_its_weights(name, build, timm_names):
    tiny = build(name)
    path = tiny.shapes.layers[-2 if name == "convnext" else -1].path
    length = len(tiny.model.get_submodule(path))

    def last_goes(where, number):
        return torch.arange(number, 0.0, -1) if where == path else torch.zeros(number)

    plan = Plan.parse(f"layers={length - 1}") if len(tiny.shapes.layers) == 1 else Plan({}, 0.5)
    child = prune(parent_of(tiny, timm_names), plan, scores(tiny, plan), rank_layers=last_goes)
    assert child.layers[path] == list(range(length - 1))
    kept = child.built.model.get_submodule(path).state_dict()
    parent = tiny.model.get_submodule(path).state_dict()
    assert len(kept) < len(parent)
    assert all(torch.equal(kept[key], parent[key]) for key in kept)
    with torch.no_grad():
        child.built.model(**tiny.inputs)


def test_block_influence_is_nothing_for_a_layer_that_adds_nothing():
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=24, depth=3, num_heads=2, img_size=32
    )
    with torch.no_grad():
        for part in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
    batches = [{"x": torch.randn(2, 3, 32, 32)}]
    influence = block_influence(model.eval(), "blocks", batches)
    assert influence[1] < 1e-7 < influence[[0, 2]].min()


def test_a_word_names_axes_of_one_kind(build):
    sizes = Plan.parse("ffn=0.5,blocks.1.mlp.f=8").sizes(build("vit").shapes)
    assert sizes == {"blocks.0.mlp.f": 48, "blocks.1.mlp.f": 8}
