"""Scores, proofs and children on the device of the parent, and of checkpoints of 16 bits."""

from dataclasses import replace

import pytest
import torch

from zoo.axes import named_shapes
from zoo.students.prune.layers import block_influence
from zoo.students.prune.library import Parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import forward_of
from zoo.students.prune.prune import prune
from zoo.students.prune.score import activation, unit_scores


def cut(parent: Parent, inputs, form: str, words: str = "ffn=0.5,stream=0.5"):
    """Score and cut, both proven; return the scores and the child."""
    shapes, plan = named_shapes(parent.model), Plan.parse(words)
    columns = activation(parent.model, shapes, [inputs], plan.sizes(shapes))
    child = prune(parent, plan, lambda a: unit_scores(columns, shapes, a), probe=inputs, form=form)
    assert child.proof is not None
    return columns, child


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["library", "zoo"])
@pytest.mark.parametrize("name", ["vit", "convnext", "llama", "mixtral", "nemotron_h"])
def test_a_parent_on_the_gpu_has_the_scores_and_the_child_that_it_has_on_the_cpu(
    name, form, build, timm_names
):
    tiny = build(name)
    on_cpu = Parent(tiny.model, *timm_names.get(name, ()))
    words = "ffn=0.5" if name == "nemotron_h" else "ffn=0.5,stream=0.5"
    expected, child = cut(on_cpu, tiny.inputs, form, words)
    moved = {key: value.cuda() for key, value in tiny.inputs.items()}
    try:
        found, other = cut(replace(on_cpu, model=tiny.model.cuda()), moved, form, words)
        path = other.shapes.layers[0].path
        assert block_influence(tiny.model, path, [moved]).device.type == "cpu"
    finally:
        tiny.model.cpu()
    for key, score in expected.items():
        torch.testing.assert_close(found[key], score, rtol=2e-5, atol=1e-9)  # float32 sums
    state = other.built.model.state_dict()
    for key, tensor in child.built.model.state_dict().items():
        assert state[key].is_cuda
        assert torch.equal(state[key].cpu(), tensor), key


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_parent_of_16_bits_is_proven_in_32_and_keeps_its_tables(name, build):
    tiny = build(name)
    model = type(tiny.model)(tiny.model.config)
    model.load_state_dict(tiny.state)
    for tensor in model.parameters():  # as from_pretrained: tables of positions stay in float32
        tensor.data = tensor.data.bfloat16()
    before = forward_of(model, tiny.inputs)(model.state_dict())[0]
    assert before.dtype == torch.float32
    _, child = cut(Parent(model.eval()), tiny.inputs, "library")
    assert child.proof
    assert child.proof.moved < 1e-5 * child.proof.control
    ours = dict(child.built.model.named_buffers())
    assert all(tensor.dtype == torch.bfloat16 for tensor in child.built.model.parameters())
    tables = {n: t for n, t in model.named_buffers() if "inv_freq" in n}
    assert tables
    assert all(torch.equal(ours[name], table) for name, table in tables.items())
