"""A sorted model is the same function, and its masked forward pass at a size is the cut child."""

import copy

import pytest
import torch

from zoo.axes import named_shapes
from zoo.students.prune import score
from zoo.students.prune.elastic import (
    checked_size,
    cut_to,
    parse_sizes,
    rank_units,
    size_of,
    sort_units,
)
from zoo.students.prune.library import Parent
from zoo.students.prune.masked import Masked, Size, Widths
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import tensors

ALL = "ffn=0.5,heads=0.5,groups=0.5,stream=0.5"
SIZES = [
    ("vit", "ffn=0.5"),
    ("vit", "stream=0.5,ffn=0.75"),
    ("vit", "stream=0.5,layers=0.5"),
    ("vit_reg", "stream=0.5"),
    ("vit_swiglu", "stream=0.5,ffn=0.5"),
    ("dinov3", "stream=0.5,ffn=0.5"),
    ("swin", "stream=0.5,ffn=0.75"),
    ("convnext", "stream=0.5"),
    ("fastervit", "stream=0.5"),
    ("mambavision", "stream=0.5"),
    ("llama", ALL),
    ("llama", "ffn=0.75,layers=0.5"),
    ("qwen3", ALL),
    ("gemma3", ALL + ",layers=0.5"),
    ("nemotron", ALL + ",layers=0.5"),
    ("mixtral", "ffn=0.5,stream=0.5"),
    ("mamba2", "stream=0.5,ssm_channels=0.5"),
    ("mamba2", "ssm_state=0.5"),
    ("mamba2", "stream=0.5,ssm_heads=0.5,layers=0.5"),
    ("nemotron_h", "stream=0.5,ssm_heads=0.5,ffn=0.5,shared=0.5,layers=3"),
    ("siglip_vision", "ffn=0.5"),
]


def sorted_parent(tiny, names, plan) -> tuple[Parent, dict[str, list[int]]]:
    """A copy of a tiny model with its units sorted by their weights, and ranks of its layers."""

    def ranking(axis):
        return score.magnitude(tiny.shapes, tiny.state, axis), ()

    model = copy.deepcopy(tiny.model)
    orders = rank_units(tiny.shapes, [plan], ranking)
    model.load_state_dict(sort_units(tiny.shapes, tiny.state, orders))
    ranks = {
        entry.path: list(reversed(range(tiny.shapes.num_layers(entry.path))))
        for entry in tiny.shapes.layers
    }
    return Parent(model, *names.get(tiny.name, ())), ranks


def outputs(model, inputs):
    with torch.no_grad():
        return list(tensors(model(**inputs)))


@pytest.mark.parametrize(("name", "words"), SIZES)
def test_masked_to_a_size_a_sorted_model_is_the_cut_child(name, words, build, timm_names):
    tiny, plan = build(name), Plan.parse(words)
    parent, ranks = sorted_parent(tiny, timm_names, plan)
    shapes = named_shapes(parent.model)
    masked = Masked(parent.model, shapes)
    whole = outputs(parent.model, tiny.inputs)
    size = checked_size(parent, masked, plan, ranks, tiny.inputs)
    child = cut_to(parent, shapes, plan, ranks).built.model
    with masked.at(size):
        found = outputs(parent.model, tiny.inputs)
    moved = 0.0
    for ours, theirs, before in zip(found, outputs(child, tiny.inputs), whole, strict=True):
        if ours.shape == theirs.shape:  # where the stream is an output, the child's is narrower
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            moved = max(moved, float((ours - before).abs().max()))
    assert moved > 1e-2
    again = outputs(parent.model, tiny.inputs)  # nothing is left of the masks
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


@pytest.mark.parametrize("name", ["vit", "llama", "mamba2", "mambavision"])
def test_sorting_the_units_of_every_axis_leaves_the_function_alone(name, build):
    tiny = build(name)
    axes = {axis: 0.99 for axis in tiny.shapes.sizes if axis not in tiny.shapes.fixed}
    columns = score.activation(tiny.model, tiny.shapes, [tiny.inputs], axes)

    def ranking(axis):
        try:  # channels are ranked in each head, states in each group
            return score.unit_scores(columns, tiny.shapes, axis)
        except ValueError:
            return score.magnitude(tiny.shapes, tiny.state, axis), ()

    orders = rank_units(tiny.shapes, [Plan(dict.fromkeys(axes, 1))], ranking)
    state = sort_units(tiny.shapes, tiny.state, orders)
    assert len(orders) > 2
    assert any(cut.by for cut in orders) or name != "mamba2"
    changed = [n for n in state if not torch.equal(state[n], tiny.state[n])]
    assert len(changed) > len(state) / 2
    before = tiny.forward(tiny.state)
    for ours, theirs in zip(tiny.forward(state), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    model = copy.deepcopy(tiny.model)  # and the best unit is the first one
    model.load_state_dict(state)
    axis = next(a for a in axes if a.endswith(("f", "p", "C")))
    again = score.activation(model, tiny.shapes, [tiny.inputs], [axis])
    scores, _ = score.unit_scores(again, tiny.shapes, axis)
    assert (scores.diff(dim=-1) <= 1e-9 * scores.max()).all()


def test_the_gradients_of_a_masked_model_are_those_of_the_cut_child(build, timm_names):
    tiny, plan = build("llama"), Plan.parse(ALL + ",layers=1")
    parent, ranks = sorted_parent(tiny, timm_names, plan)
    shapes = named_shapes(parent.model)
    masked, size = Masked(parent.model, shapes), size_of(shapes, plan, ranks)
    child = cut_to(parent, shapes, plan, ranks).built.model
    with masked.at(size):
        parent.model(**tiny.inputs).logits.square().sum().backward()
    child(**tiny.inputs).logits.square().sum().backward()
    ours = {n: p.grad for n, p in parent.model.named_parameters()}
    skipped = masked.skipped(size.layers)
    assert len(skipped) == sum("layers.0." in name for name in ours)
    for name, theirs in child.named_parameters():
        grad = ours[name.replace("layers.0.", "layers.1.")]  # of two layers, 1 is the better one
        assert grad is not None
        assert theirs.grad is not None
        assert grad.count_nonzero() == theirs.grad.count_nonzero(), name
        assert grad.norm().item() == pytest.approx(theirs.grad.norm().item(), rel=1e-9)


def test_masks_hold_under_autocast(build, timm_names):
    tiny, plan = build("llama"), Plan.parse("ffn=0.5,stream=0.5")
    parent, ranks = sorted_parent(tiny, timm_names, plan)
    model = parent.model.float()
    shapes = named_shapes(model)
    child = cut_to(parent, shapes, plan, ranks).built.model
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole, theirs = (m(**tiny.inputs).logits for m in (model, child))
        with Masked(model, shapes).at(size_of(shapes, plan, ranks)):
            ours = model(**tiny.inputs).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).abs().max() < 0.05 * (ours - whole).abs().max()


def test_a_one_hot_choice_of_widths_is_the_size_and_its_gradient_reaches_the_choice(build):
    tiny = build("llama")
    masked = Masked(tiny.model, tiny.shapes)
    axes = {axis: n for axis, n in tiny.shapes.sizes.items() if axis.endswith(("f", "C", "q"))}
    share = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    chosen = {a: Widths((n // 2, n * 3 // 4, n), share) for a, n in axes.items()}
    fixed = {a: Widths((n * 3 // 4,)) for a, n in axes.items()}
    with masked.at(Size(fixed)):
        expected = outputs(tiny.model, tiny.inputs)[0]
    with masked.at(Size(chosen)):
        found = tiny.model(**tiny.inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    assert share.grad is not None
    assert share.grad.abs().min() > 0


def test_a_model_that_keeps_something_of_its_width_is_refused_as_elastic(
    build, timm_names, monkeypatch
):
    tiny, plan = build("llama"), Plan.parse("stream=0.5")
    parent, ranks = sorted_parent(tiny, timm_names, plan)
    plain = type(parent.model).forward

    def scaled(self, **kwargs):  # by the whole width, which the masked model still has
        out = plain(self, **kwargs)
        out.logits = out.logits * self.lm_head.weight.shape[1]
        return out

    monkeypatch.setattr(type(parent.model), "forward", scaled)
    with pytest.raises(ValueError, match="cannot be trained as one"):
        checked_size(parent, Masked(parent.model, tiny.shapes), plan, ranks, tiny.inputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "There is no size"),
        ("ffn=0.5", "is no size"),
        ("full:ffn=0.5", "is no size"),
        ("a:ffn=0.5;a:ffn=0.7", "is no size"),
        ("a:ffn=2.5", "says nothing to keep"),
    ],
)
def test_sizes_that_say_nothing_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sizes(text)
