"""Named shapes: the tables are those of the libraries' models, and a wrong one is caught."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import zoo.axes
from zoo import eradio, fastervit, mambavision, radio
from zoo.axes import named_shapes, parse_tables
from zoo.students.prune.cut import keep_units
from zoo.students.prune.proof import LIMIT, prove, prove_axis

TABLES = "\n".join(
    [
        *(path.read_text() for path in Path(zoo.axes.__file__).parent.glob("tables/*.txt")),
        *(family.SHAPES for family in (eradio, fastervit, mambavision, radio)),
    ]
)
SAMPLED = re.compile(r"^C\d$|^blocks\.(0\.0|1\.0|3\.1)\.|^w$")


def offered(tiny) -> list[str]:
    axes = [axis for axis, size in tiny.shapes.sizes.items() if size > 1]
    if tiny.name.startswith("efficientnet"):  # the smallest has forty axes and takes half a minute
        axes = [axis for axis in axes if SAMPLED.search(axis)][:6]
    return [axis for axis in axes if axis not in tiny.shapes.rigid]


def test_the_count_from_letters_is_the_number_of_parameters(each):
    numbers = {id(t): t.numel() for t in each.model.state_dict(keep_vars=True).values()}
    assert each.shapes.count() == sum(numbers.values())


def test_permuting_an_axis_moves_nothing_and_its_control_does(each):
    proofs = prove(each.shapes, each.state, each.forward, offered(each))
    assert len(proofs) > 2


def test_channels_under_a_rotation_are_refused_and_the_proof_agrees(each):
    rotated = [axis for axis, reason in each.shapes.fixed.items() if reason == "rope"]
    before = each.forward(each.state)
    for axis in rotated[:1]:
        proof = prove_axis(each.shapes, each.state, each.forward, before, axis)
        assert proof.moved > 10 * LIMIT * proof.control
        with pytest.raises(ValueError, match=f"{re.escape(axis)} is none.*table is wrong"):
            prove(each.shapes, each.state, each.forward, [axis])
    assert rotated or not re.match("eva|dinov3|llama|qwen|mistral|gemma|mixtral|llava", each.name)


def test_a_blind_axis_is_no_proof(build):
    vit = build("vit")
    dead = dict(vit.state) | {"blocks.1.mlp.fc2.weight": torch.zeros(24, 96).double()}
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.f is blind"):
        prove(vit.shapes, dead, vit.forward, ["blocks.1.mlp.f"])


def test_as_many_tensors_change_as_the_table_says(each):
    axis = offered(each)[-1]
    order = torch.arange(each.shapes.sizes[axis]).roll(1)
    state, _ = keep_units(each.shapes, each.state, axis, order)
    changed = {name for name in state if state[name] is not each.state[name]}
    named = {slot.param for slot in each.shapes.slots(axis)}
    assert changed == named | {n for n, first in each.shapes.tied.items() if first in named}
    assert all(not torch.equal(state[name], each.state[name]) for name in named)


def test_an_unknown_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"tensors of Beit have no named shape.*timm's Beit"):
        named_shapes(timm.create_model("beit_base_patch16_224", embed_dim=24, depth=1, num_heads=2))
    with pytest.raises(ValueError, match=r"2 tensors of Linear.*weight, bias.*torch's Linear"):
        named_shapes(nn.Linear(2, 3))


def test_a_size_that_does_not_solve_names_tensor_dim_and_letters(build):
    wrong = TABLES.replace("qkv.weight                  3 h d, C", "qkv.weight  5 h d, C")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight: dim 0 has length 72"):
        named_shapes(build("vit").model, parse_tables(wrong))


def test_a_missing_line_names_the_tensor():
    without = re.sub(r"\nls1\.gamma .*", "", TABLES)
    model = timm.create_model(
        "vit_small_patch14_dinov2", embed_dim=24, depth=1, num_heads=2, img_size=28
    )
    with pytest.raises(ValueError, match=r"1 tensors of VisionTransformer.*blocks\.0\.ls1\.gamma"):
        named_shapes(model, parse_tables(without))


IN_PROJ = "g r p | g r p | g s | g s | g r, C"
MUTATIONS = [
    ("mamba2", IN_PROJ, "g s | g r p | g r p | g s | g r, C"),
    ("mamba2", IN_PROJ, "g r p | g s | g r p | g s | g r, C"),
    ("mamba2", IN_PROJ, "g r | g r p | g r p | g s | g s, C"),
    ("mamba2", IN_PROJ, "r g p | r g p | g s | g s | g r, C"),
    ("nemotron_h", IN_PROJ, "g r p | p g r | g s | g s | g r, C"),
    ("mamba2", "g r p | g s | g s, 1, _", "g s | g r p | g s, 1, _"),
    ("mamba2", "norm.weight                 g r p", "norm.weight  g p r"),
    ("llama", "q_proj.weight               k q d", "q_proj.weight  q k d"),
    ("qwen2", "o_proj.weight               C, k q d", "o_proj.weight  C, q k d"),
    ("llama", "k_proj.weight               k d", "k_proj.weight  d k"),
    ("vit", "qkv.weight                  3 h d", "qkv.weight  h 3 d"),
    ("vit", "qkv.weight                  3 h d", "qkv.weight  h d 3"),
    ("mixtral", "experts.gate_up_proj        e, 2 f", "experts.gate_up_proj  e, f 2"),
    ("vit_swiglu", "fc1.weight                  2 f", "fc1.weight  f 2"),
    ("swin", "reduction.weight            C, 4 C-", "reduction.weight  C, C- 4"),
    ("swin", "norm.weight                 4 C-", "norm.weight  C- 4"),
    ("mambavision", "proj.weight                 C, p | z", "proj.weight  C, z | p"),
    ("mambavision", "x_proj.weight               l | s | s", "x_proj.weight  s | s | l"),
    ("eradio", "leave.conv.weight           C, a | x b", "leave.conv.weight  C, a | b x"),
    ("convnext", "downsample.1.weight         C, C-", "downsample.1.weight  C, _"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), MUTATIONS)
def test_a_wrong_table_is_caught_by_the_solver_or_by_the_proof(name, right, wrong, build):
    assert right in TABLES
    model = build(name)
    with pytest.raises(ValueError, match=r"cannot have|is none|leaves more"):
        shapes = named_shapes(model.model, parse_tables(TABLES.replace(right, wrong)))
        prove(shapes, model.state, model.forward)
