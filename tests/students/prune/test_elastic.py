"""A sorted model is the same function, and its masked forward pass at a size is the cut child."""

import copy

import pytest
import torch

from zoo.axes import named_shapes
from zoo.students.prune import score
from zoo.students.prune.elastic import cut_to, parse_sizes, size_of, sort_units
from zoo.students.prune.library import Parent
from zoo.students.prune.masked import Masked, Widths
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
    ("gemma3", "ffn=0.5,heads=0.5,layers=0.5"),
    ("nemotron", ALL + ",layers=0.5"),
    ("mixtral", "ffn=0.5,stream=0.5"),
    ("mamba2", "stream=0.5,ssm_channels=0.5"),
    ("mamba2", "ssm_state=0.5"),
    ("mamba2", "stream=0.5,ssm_heads=0.5,layers=0.5"),
    ("nemotron_h", "stream=0.5,ssm_heads=0.5,ffn=0.5,shared=0.5,layers=3"),
    ("siglip_vision", "stream=0.5,ffn=0.5"),
]


def sorted_parent(tiny, names, plan) -> tuple[Parent, dict[str, list[int]]]:
    """A copy of a tiny model with its units sorted by their weights, and ranks of its layers."""
    axes = plan.sizes(tiny.shapes)

    def ranking(axis):
        return score.magnitude(tiny.shapes, tiny.state, axis), ()

    model = copy.deepcopy(tiny.model)
    model.load_state_dict(sort_units(tiny.shapes, tiny.state, list(axes), ranking))
    ranks = {
        entry.path: list(reversed(range(tiny.shapes.num_layers(entry.path))))
        for entry in tiny.shapes.layers
    }
    return Parent(model, *names.get(tiny.name, ())), ranks


def outputs(model, inputs):
    with torch.no_grad():
        return list(tensors(model(**inputs)))


@pytest.mark.parametrize(("name", "words"), SIZES)
def test_the_masked_forward_pass_at_a_size_is_the_cut_child(name, words, build, timm_names):
    tiny, plan = build(name), Plan.parse(words)
    parent, ranks = sorted_parent(tiny, timm_names, plan)
    whole = outputs(parent.model, tiny.inputs)
    for ours, theirs in zip(whole, outputs(tiny.model, tiny.inputs), strict=True):
        if plan.axes.keys() != {"stream"}:  # where the stream is an output, it is permuted too
            assert ours.shape == theirs.shape
    shapes = named_shapes(parent.model)
    child = cut_to(parent, shapes, plan, ranks, probe=tiny.inputs)
    size = size_of(shapes, plan, ranks)
    with Masked(parent.model, shapes).at(size.widths, size.layers):
        found = outputs(parent.model, tiny.inputs)
    moved = 0.0
    for ours, theirs, before in zip(
        found, outputs(child.built.model, tiny.inputs), whole, strict=True
    ):
        if ours.shape == theirs.shape:
            print(
                name, words, float((ours - theirs).abs().max()), float((ours - before).abs().max())
            )
            moved = max(moved, float((ours - before).abs().max()))
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert moved > 1e-3
    again = outputs(parent.model, tiny.inputs)  # nothing is left of the masks
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
