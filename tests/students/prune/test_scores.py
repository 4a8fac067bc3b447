"""Scores of units: each is what its name says, and equal however its samples are shared out."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo.axes import Shape, Shapes
from zoo.students.prune.ranking import Measure
from zoo.students.prune.removal import removal
from zoo.students.prune.score import activation, routing, unit_scores, x_score
from zoo.students.prune.taylor import own_loss, taylor

ALIKE: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)


class Mlp(nn.Module):
    """Two products over tokens; `f` units between them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())


MLP = Shapes(
    tensors={
        "up.weight": Shape(((("f",),), (("C",),)), 1),
        "up.bias": Shape(((("f",),),)),
        "down.weight": Shape(((("C",),), (("f",),)), 1),
        "down.bias": Shape(((("C",),),)),
    },
    sizes={"f": 5, "C": 3},
)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp().double()


def hidden_of(mlp, x):
    return mlp.up(x).relu()


@pytest.mark.parametrize("tokens", ["mean", "l2", "max", "var"])
@pytest.mark.parametrize("samples", ["l2", "mean", "var"])
def test_tokens_are_aggregated_first_then_samples(tokens, samples, mlp):
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    h = hidden_of(mlp, x).detach()
    over_tokens = {
        "mean": h.abs().mean(1),
        "l2": h.norm(dim=1),
        "max": h.abs().amax(1),
        "var": h.var(1, unbiased=False),
    }[tokens]
    expected = {
        "l2": over_tokens.norm(dim=0),
        "mean": over_tokens.mean(0),
        "var": over_tokens.var(0, unbiased=False),
    }[samples]
    for sizes in ([7], [1] * 7, [3, 3, 1]):
        parts = [{"x": part} for part in x.split(sizes)]
        found = activation(mlp, MLP, parts, ["f"], tokens=tokens, samples=samples)
        torch.testing.assert_close(found["down.weight"], expected, **ALIKE)


def test_the_order_of_aggregation_changes_which_unit_is_best(mlp):
    """The table of Minitron's appendix: which of the two goes first is the method."""
    with torch.no_grad():
        mlp.up.weight.zero_()
        mlp.up.bias.zero_()
        mlp.up.weight[0, 0] = mlp.up.weight[1, 1] = 1
    x = torch.zeros(2, 4, 3, dtype=torch.float64)
    x[0, 0, 0] = 10  # one token alone
    x[:, :, 1] = 2  # every token a little
    seldom, often = 0, 1
    mean = activation(mlp, MLP, [{"x": x}], ["f"], tokens="mean")["down.weight"]
    norm = activation(mlp, MLP, [{"x": x}], ["f"], tokens="l2")["down.weight"]
    assert mean[often] > mean[seldom]
    assert norm[seldom] > norm[often]


def padded(rows, pad=0):
    """Put rows of different lengths into one batch."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_tokens_that_are_padding_do_not_count(name, build):
    tiny = build(name)
    torch.manual_seed(0)
    rows = [torch.randint(3, 38, (n,)) for n in (7, 4, 6, 1, 5)]
    axes = [a for a in tiny.shapes.sizes if tiny.shapes.readers(a)]
    alone = activation(tiny.model, tiny.shapes, [{"input_ids": row[None]} for row in rows], axes)
    for cut in ([rows], [rows[:3], rows[3:]]):
        batches = [padded(part, pad=1) for part in cut]
        together = activation(tiny.model, tiny.shapes, batches, axes)
        assert together.keys() == alone.keys()
        near = 1e-9 if name == "gemma3" else 1e-12  # its norms are float32 in float64
        for weight in alone:
            torch.testing.assert_close(together[weight], alone[weight], rtol=near, atol=near)


def test_padding_that_a_router_mixes_up_is_refused(build):
    mixtral = build("mixtral")
    batch = padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    with pytest.raises(ValueError, match="rows of one length"):
        activation(mixtral.model, mixtral.shapes, [batch], ["model.layers.0.mlp.f"])


def test_a_reader_that_no_product_uses_is_an_error_with_its_name(mlp):
    mlp.forward = mlp.up.forward
    columns = activation(mlp, MLP, [{"input": torch.randn(2, 4, 3, dtype=torch.float64)}], ["f"])
    with pytest.raises(ValueError, match=r"f is read by 1 weights.*down\.weight.*magnitude"):
        unit_scores(columns, MLP, "f")


def test_every_reader_of_every_kind_of_axis_is_seen(build):
    for name in ("siglip_vision", "nemotron_h", "mambavision", "eradio", "gemma3"):
        tiny = build(name)
        axes = [a for a in tiny.shapes.sizes if tiny.shapes.readers(a)]
        seen = activation(tiny.model, tiny.shapes, [tiny.inputs], axes).keys()
        readers = {s.param for a in axes for s in tiny.shapes.readers(a)}
        assert all("position" in name for name in readers - seen), readers - seen


def test_wanda_sums_weights_times_the_norms_of_their_inputs(mlp):
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    measure = Measure(model=mlp, shapes=MLP, batches=lambda: [{"x": x}], axes=("f",))
    norms = hidden_of(mlp, x).flatten(0, 1).norm(dim=0)
    expected = (mlp.down.weight.abs() * norms).sum(0).detach()
    torch.testing.assert_close(measure.rank("wanda")("f")[0], expected, **ALIKE)


def test_taylor_sums_weight_times_gradient_over_all_weights_of_a_unit(mlp):
    x = torch.randn(6, 4, 3, dtype=torch.float64)

    def loss(model, batch):
        return model(batch["x"]).square().mean((1, 2)).sum()

    loss(mlp, {"x": x}).backward()
    gone = {name: (p * p.grad).abs() for name, p in mlp.named_parameters()}
    expected = gone["up.weight"].sum(1) + gone["up.bias"] + gone["down.weight"].sum(0)
    mlp.zero_grad()
    for sizes in ([6], [1] * 6, [4, 2]):
        batches = [{"x": part} for part in x.split(sizes)]
        found = taylor(mlp, MLP, batches, ["f"], loss)["f"]
        torch.testing.assert_close(found, expected.detach(), **ALIKE)
    assert all(p.grad is None for p in mlp.parameters())


def test_the_own_loss_is_that_of_the_next_token_where_there_is_a_head(build):
    llama, bert = build("llama"), build("bert")
    ids = llama.inputs["input_ids"]
    with torch.no_grad():
        expected = llama.model(input_ids=ids, labels=ids).loss * len(ids)
        found = own_loss(llama.model, llama.inputs)
        torch.testing.assert_close(found.float(), expected)  # theirs is float32
        rows = [torch.randint(3, 38, (n,)) for n in (6, 3)]
        together = own_loss(bert.model, padded(rows, pad=1))
        alone = sum(own_loss(bert.model, {"input_ids": row[None]}) for row in rows)
    torch.testing.assert_close(together, alone, **ALIKE)


@pytest.mark.parametrize(
    ("name", "axis", "shape"),
    [
        ("llama", "model.layers.0.self_attn.q", (2, 2)),
        ("mixtral", "model.layers.0.mlp.f", (4, 48)),
        ("mamba2", "backbone.layers.0.mixer.s", (2, 6)),
        ("mambavision", "stages.2.blocks.0.mixer.s", (8,)),
    ],
)
def test_taylor_scores_every_axis_in_its_outer_units(name, axis, shape, build):
    tiny = build(name)
    scores = taylor(tiny.model, tiny.shapes, [tiny.inputs], [axis])[axis]
    assert scores.shape == shape
    assert (scores > 0).sum() > scores.numel() // 2


def test_a_state_is_worth_what_its_mixer_does_without_it(build):
    tiny = build("mambavision")
    axis, path = "stages.2.blocks.0.mixer.s", "stages.2.blocks.0.mixer"
    x = torch.cat([tiny.inputs["x"], tiny.inputs["x"].flip(-1)])
    found, by = removal(tiny.model, tiny.shapes, [{"x": x}], axis)
    assert by == ()
    for sizes in ([1] * 4, [3, 1]):
        batches = [{"x": part} for part in x.split(sizes)]
        again, _ = removal(tiny.model, tiny.shapes, batches, axis)
        torch.testing.assert_close(again, found, **ALIKE)
    model, outputs = copy.deepcopy(tiny.model), []
    mixer = model.get_submodule(path)
    mixer.register_forward_hook(lambda m, i, out: outputs.append(out))
    with torch.no_grad():
        model(x)
        mixer.x_proj.weight[mixer.widths[0] + 2] = 0  # B of state 2: nothing is written to it
        model(x)
    moved = (outputs[1] - outputs[0]).norm(dim=-1).view(4, -1).mean(1).norm()
    torch.testing.assert_close(found[2], moved, **ALIKE)


def test_a_state_of_a_group_that_nothing_is_written_to_is_worth_nothing(build):
    tiny = build("mamba2")
    axis = "backbone.layers.0.mixer.s"
    model = copy.deepcopy(tiny.model)
    conv = model.backbone.layers[0].mixer.conv1d
    with torch.no_grad():  # the convolution's channels are 64 of x, then B of both groups
        conv.weight[64 + 6 + 1] = conv.bias[64 + 6 + 1] = 0
    found, by = removal(model, tiny.shapes, [tiny.inputs], axis)
    assert by == ("backbone.layers.0.mixer.g",)
    assert (found == 0).nonzero().tolist() == [[1, 1]]


def test_an_axis_of_several_modules_is_not_scored_by_leaving_out(build):
    with pytest.raises(ValueError, match="lies in several modules"):
        removal(build("vit").model, build("vit").shapes, [build("vit").inputs], "C")


def test_the_x_score_sees_what_goes_into_the_scan(build):
    mamba = build("mamba2")
    mixer, seen = mamba.model.backbone.layers[0].mixer, []
    hook = mixer.in_proj.register_forward_hook(lambda m, i, out: seen.append(out))
    channels, by = x_score(mamba.model, mamba.shapes, [mamba.inputs], "backbone.layers.0.mixer.p")
    heads, group = x_score(mamba.model, mamba.shapes, [mamba.inputs], "backbone.layers.0.mixer.r")
    hook.remove()
    x = seen[-1][..., 64:128].abs().mean(1).square().sum(0).sqrt().view(8, 8)
    torch.testing.assert_close(channels, x.norm(dim=0))
    torch.testing.assert_close(heads, x.norm(dim=1).view(2, 4))
    assert (by, group) == ((), ("backbone.layers.0.mixer.g",))
    with pytest.raises(ValueError, match="no head or channel of a Mamba-2 mixer"):
        x_score(mamba.model, mamba.shapes, [mamba.inputs], "backbone.layers.0.mixer.s")


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_routing_is_the_mean_probability_of_an_expert(name, build):
    tiny = build(name)
    axis = next(a for a in tiny.shapes.sizes if a.endswith(".e"))
    gate = tiny.model.get_submodule(f"{axis[:-2]}.gate")
    seen = []
    hook = gate.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = routing(tiny.model, tiny.shapes, [tiny.inputs], [axis])[axis]
    hook.remove()
    logits = seen[-1].flatten(0, -2).float() @ gate.weight.float().T
    near: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.float(), logits.softmax(-1).mean(0), **near)
    with pytest.raises(ValueError, match="has no router"):
        routing(tiny.model, tiny.shapes, [tiny.inputs], ["C"])


@pytest.mark.slow
def test_each_score_by_name_ranks_every_axis_of_a_hybrid(build):
    tiny = build("nemotron_h")
    axes = tuple(a for a in tiny.shapes.sizes if a not in tiny.shapes.fixed)
    for experts in ("load", "routing"):
        measure = Measure(
            model=tiny.model,
            shapes=tiny.shapes,
            batches=lambda: [tiny.inputs],
            axes=axes,
            experts=experts,
        )
        for name in ("activation", "contribution", "wanda", "taylor", "x", "magnitude", "random"):
            for axis in axes:
                values, by = measure.rank(name)(axis)
                grid = [tiny.shapes.sizes[a] for a in (*by, axis)]
                assert list(values.shape) == grid
                assert values.isfinite().all()


RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import tiny
from zoo.students.prune.ranking import Measure
from zoo.train.mesh import sum_over_ranks, ranks
with ranks(torch.device("cpu")):
    t = tiny("mixtral")
    torch.manual_seed(5)
    ids = torch.randint(3, 38, (5, 7))
    mine = ids[:2] if dist.get_rank() == 0 else ids[2:]
    axes = ("C", "model.layers.0.mlp.f", "model.layers.0.mlp.e", "model.layers.1.self_attn.q")
    def measure(rows, total):
        return Measure(model=t.model, shapes=t.shapes, batches=lambda: [{"input_ids": rows}],
                       axes=axes, total=total)
    both, alone = measure(mine, sum_over_ranks), measure(ids, lambda x: x)
    for name in ("activation", "contribution", "wanda", "taylor"):
        for axis in axes:
            torch.testing.assert_close(both.rank(name)(axis)[0], alone.rank(name)(axis)[0],
                                       rtol=1e-12, atol=1e-12)
    print("equal")
"""


@pytest.mark.long
def test_scores_of_two_ranks_are_those_of_one(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "ranks.py").write_text(RANKS)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*command, *port, str(tmp_path / "ranks.py"), here],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal") == 2
