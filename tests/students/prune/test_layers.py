"""Which layers go: every score against an oracle, and what stands in for a part that went."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.axes import named_shapes
from zoo.cut_format import Emulated
from zoo.students.prune.emulate import Moments, emulate, low_rank
from zoo.students.prune.layers import (
    Without,
    contiguous,
    difference_of_means,
    left_out,
    loss_without,
    own_metric,
    shapley,
    sublayers,
)
from zoo.students.prune.library import NotExpressible, Parent, save
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import prune


class Table:
    """A set function with a random value for each set, and how often it was asked."""

    def __init__(self, length, seed=0):
        draws = torch.Generator().manual_seed(seed)
        subsets = itertools.chain.from_iterable(
            itertools.combinations(range(length), n) for n in range(length + 1)
        )
        self.values = {frozenset(s): float(torch.rand((), generator=draws)) for s in subsets}

    def __call__(self, gone):
        return self.values[frozenset(gone)]


def exact_shapley(value, length):
    """Enumerate all subsets, weighed by |S|! (n - |S| - 1)! / n!."""
    out = torch.zeros(length, dtype=torch.float64)
    for i in range(length):
        others = [j for j in range(length) if j != i]
        for size in range(length):
            weight = math.factorial(size) * math.factorial(length - size - 1)
            for subset in itertools.combinations(others, size):
                out[i] += weight * (value({*subset, i}) - value(subset))
    return out / math.factorial(length)


def test_shapley_values_of_four_layers_approach_those_of_all_subsets():
    value = Table(4)
    exact = exact_shapley(value, 4)
    errors = [
        (shapley(value, 4, permutations=n, seed=1) - exact).abs().max() for n in (4, 64, 4096)
    ]
    assert errors[2] < 0.01 < errors[0]
    assert errors[2] < errors[1]


def test_shapley_values_add_up_to_the_cost_of_everything():
    value = Table(5)
    for n in (2, 6):
        total = shapley(value, 5, permutations=n).sum()
        assert float(total) == pytest.approx(value(range(5)) - value(()), abs=1e-12)
    twice = [shapley(value, 5, permutations=4, seed=s) for s in (3, 3, 4)]
    assert torch.equal(twice[0], twice[1])
    assert not torch.equal(twice[0], twice[2])


def test_every_score_is_the_cost_of_a_layer_where_costs_add_up():
    costs = torch.tensor([0.3, 0.1, 0.7, 0.2], dtype=torch.float64)

    def value(gone):
        return 2.0 + sum(float(costs[i]) for i in gone)

    torch.testing.assert_close(loss_without(value, 4), costs)
    torch.testing.assert_close(shapley(value, 4, permutations=2), costs)
    # over leave-one-out runs: the own cost, less the mean of the others'
    means = costs - (costs.sum() - costs) / 3
    torch.testing.assert_close(difference_of_means(value, 4), means)
    halves = difference_of_means(value, 4, draws=400, seed=0)
    assert halves.argsort().tolist() == costs.argsort().tolist()


def test_the_difference_of_means_needs_each_layer_present_and_absent():
    with pytest.raises(ValueError, match="take more of them"):
        difference_of_means(Table(4), 4, draws=1)


def test_contiguous_finds_the_run_whose_joint_removal_costs_least():
    single = {0: 0.0, 1: 0.9, 2: 0.0, 3: 0.5, 4: 0.5}

    def value(gone):
        if set(gone) == {3, 4}:
            return 0.1  # together they cost less than each alone
        return sum(single[i] for i in gone)

    assert contiguous(value, 5, 2).tolist() == [1, 1, 1, 0, 0]
    alone = loss_without(value, 5)
    assert sorted(alone.argsort()[:2].tolist()) == [0, 2]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=24, depth=4, num_heads=2, img_size=32, num_classes=5
    ).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def test_a_model_without_layers_is_the_one_that_never_had_them(vit):
    x = torch.randn(3, 3, 32, 32)
    with left_out(vit, ["blocks.1", "blocks.3"]), torch.no_grad():
        found = vit(x)
    blocks = vit.blocks
    vit.blocks = nn.Sequential(blocks[0], blocks[2])
    with torch.no_grad():
        torch.testing.assert_close(found, vit(x), rtol=0, atol=0)


def test_any_metric_ranks_layers_and_each_set_is_measured_once(vit):
    x, asked = torch.randn(3, 3, 32, 32), []

    def metric(model):
        asked.append(1)
        return float(model(x).square().mean().sqrt())

    value = Without(vit, [f"blocks.{i}" for i in range(4)], metric)
    first = loss_without(value, 4)
    loss_without(value, 4)
    assert len(asked) == 5
    with torch.no_grad():
        vit.blocks[2].attn.proj.weight.zero_()
        vit.blocks[2].attn.proj.bias.zero_()
        vit.blocks[2].mlp.fc2.weight.zero_()
        vit.blocks[2].mlp.fc2.bias.zero_()
    again = loss_without(Without(vit, value.parts, metric), 4)
    assert again[2] == 0 != first[2]


def test_the_own_metric_is_the_loss_of_the_next_token_or_the_distance_to_its_own_outputs(
    vit, build
):
    x = torch.randn(3, 3, 32, 32)
    metric = own_metric(vit, lambda: [{"x": x[:2]}, {"x": x[2:]}])
    assert metric(vit) == pytest.approx(0, abs=1e-6)
    with left_out(vit, ["blocks.0"]):
        assert metric(vit) > 1e-4
    llama = build("llama")
    ids = llama.inputs["input_ids"]
    with torch.no_grad():
        expected = float(llama.model(input_ids=ids, labels=ids).loss)
    assert own_metric(llama.model, lambda: [llama.inputs])(llama.model) == pytest.approx(expected)


def test_sub_layers_are_branches_beside_the_stream(build):
    def found(name):
        tiny = build(name)
        return sublayers(tiny.model, tiny.shapes, tiny.shapes.layers[-1].path)

    assert found("vit") == {
        "attention": ["blocks.0.attn", "blocks.1.attn"],
        "ffn": ["blocks.0.mlp", "blocks.1.mlp"],
    }
    assert found("gemma3")["ffn"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found("mixtral")["ffn"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found("nemotron_h") == {
        "attention": ["model.layers.0.mixer", "model.layers.1.mixer"],
        "ffn": ["model.layers.2.mixer", "model.layers.3.mixer"],
    }
    assert found("bert") == {}  # their norms stand behind the sum, inside the modules


# What stands in


def moments_of(x, f):
    n = torch.tensor(float(len(x)), dtype=torch.float64)
    return Moments(n, x.sum(0), f.sum(0), x.T @ x, x.T @ f)


def test_a_linear_map_of_full_rank_is_least_squares():
    torch.manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    f = torch.randn(50, 6, dtype=torch.float64) + x**2
    down, up, bias = low_rank(moments_of(x, f), 6)
    design = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, f).solution
    torch.testing.assert_close(down @ up, expected[:6])
    torch.testing.assert_close(bias, expected[6])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_map_of_low_rank_is_the_best_of_its_rank(rank):
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([3.0, 1, 1, 0.3, 0.1])
    f = torch.tanh(x @ torch.randn(5, 5, dtype=torch.float64)) + 0.5
    moments = moments_of(x, f)

    def error(down, up, bias):
        return (f - bias - x @ down @ up).square().sum()

    down, up, bias = low_rank(moments, rank)
    best = error(down, up, bias)
    whole = low_rank(moments, 5)
    # truncating the map itself, or its inputs, is worse
    u, s, v = torch.linalg.svd(whole[0] @ whole[1])
    cut = (u[:, :rank] * s[:rank], v[:rank])
    assert best < error(*cut, f.mean(0) - x.mean(0) @ cut[0] @ cut[1])
    # and descent from there finds nothing better
    tried = [t.clone().requires_grad_() for t in (down, up, bias)]
    optimizer = torch.optim.LBFGS(tried, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = error(*tried)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert error(*tried) > best * (1 - 1e-6)


def test_a_constant_stands_in_exactly_for_a_part_that_gives_one(vit):
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.weight.zero_()  # what is left is its bias
    x = torch.randn(4, 3, 32, 32)
    parent = Parent(vit, "vit_tiny_patch16_224", dict(embed_dim=24))
    thin = emulate(parent, ["blocks.1.mlp"], lambda: [{"x": x}])
    with torch.no_grad():
        torch.testing.assert_close(thin.model(x), vit(x))
        plain = emulate(parent, ["blocks.1.mlp"], lambda: [{"x": x}], rank=None)
        assert not torch.allclose(plain.model(x), vit(x), atol=1e-3)
    assert not isinstance(vit.blocks[1].mlp, Emulated)


@pytest.mark.parametrize("name", ["vit", "llama", "gemma3"])
def test_a_better_stand_in_is_nearer_to_the_part(name, build, timm_names):
    tiny = build(name)
    path = tiny.shapes.layers[0].path
    part = sublayers(tiny.model, tiny.shapes, path)["ffn"][-1]
    parent = Parent(tiny.model, *timm_names.get(name, ()))
    module, far = tiny.model.get_submodule(part), []
    seen = []
    hook = module.register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
    with torch.no_grad():
        tiny.model(**tiny.inputs)
    hook.remove()
    for rank in (None, 0, 2, 8):
        thin = emulate(parent, [part], lambda: [tiny.inputs], rank=rank)
        x, f = seen[0]
        with torch.no_grad():
            far.append(float((thin.model.get_submodule(part)(x) - f).square().sum()))
            thin.model(**tiny.inputs)
    assert far == sorted(far, reverse=True)
    assert far[3] < far[0]


def test_a_model_with_stand_ins_is_cut_further_saved_and_loaded(build, timm_names, tmp_path):
    for name, gone in (("vit", "blocks.0.attn"), ("llama", "model.layers.1.self_attn")):
        tiny = build(name)
        parent = Parent(tiny.model, *timm_names.get(name, ()))
        thin = emulate(parent, [gone], lambda tiny=tiny: [tiny.inputs], rank=2)
        shapes = named_shapes(thin.model)
        assert shapes.count() < tiny.shapes.count()
        with pytest.raises(NotExpressible, match="no place for what stands in"):
            prune(thin, Plan.parse("ffn=0.5"), ones(shapes))
        plan = Plan.parse("stream=0.5,ffn=0.5")
        child = prune(thin, plan, ones(shapes), probe=tiny.inputs, form="zoo")
        save(child.built, tmp_path / name)
        again = zoo.create_model(f"local-dir:{tmp_path / name}")
        assert isinstance(again.get_submodule(gone), Emulated)
        with torch.no_grad():
            found, expected = (m(**tiny.inputs) for m in (again, child.built.model))
        found, expected = (x if name == "vit" else x.logits for x in (found, expected))
        # transformers computes its rotary table in another precision when it loads
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if name == "vit" else 1e-5)


def ones(shapes):
    """Keep the first units."""
    return lambda axis: (-torch.arange(float(shapes.sizes[axis])), ())


def test_what_changes_the_width_cannot_go(build):
    swin = build("swin")
    with (
        left_out(swin.model, ["layers.1.downsample"]),
        pytest.raises(ValueError, match="cannot be left out"),
    ):
        swin.model(**swin.inputs)
