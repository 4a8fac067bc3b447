"""Networks compiled block by block: few graphs, the same figures, drop path's rates apart."""

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import zoo
from zoo.compiled_blocks import SharedDropPath, compile_blocks, repeated_blocks


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_the_blocks_of_vits_and_convnets_are_found():
    vit, resnet = timm.create_model("test_vit"), timm.create_model("test_resnet")
    assert repeated_blocks(vit) == list(vit.blocks)
    convnet = timm.create_model("test_convnext")
    depths = [len(stage.blocks) for stage in convnet.stages]
    assert max(depths) > 1  # a row of stages of one kind, all of other sizes, is no row of blocks
    rows = [block for stage in convnet.stages if len(stage.blocks) > 1 for block in stage.blocks]
    assert repeated_blocks(convnet) == rows
    assert all(isinstance(block, type(resnet.layer1[0])) for block in repeated_blocks(resnet))
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


DEPTHS = {
    "mambavision_t": ((2, 2, 4, 4), (3, 3, 8, 6)),
    "fastervit_2": ((2, 2, 3, 3), (3, 3, 6, 5)),
    "eradio_nano": ((2, 2, 2, 2), (3, 3, 4, 4)),
    "convnext_tiny": ((2, 2, 2, 2), (3, 3, 5, 4)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n == "fastervit_2" else ()) for n in DEPTHS],
)
def test_more_blocks_need_no_more_code_though_drop_path_rises(name):
    few, many = (graphs_of(name, depths=depths) for depths in DEPTHS[name])
    assert len(few) == len(many)


def test_blocks_of_a_vit_are_two_graphs():
    graphs = graphs_of("vit_tiny_patch16_224", img_size=64)
    assert sum(size > 5 for size in graphs) == 2  # a drop path of 0 is none


def graphs_of(name: str, **options) -> list[int]:
    """Compile a network's blocks, run them in training, and count the operators of each graph."""
    graphs: list[int] = []

    def count(graph, example_inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    network = zoo.create_model(name, drop_path_rate=0.3, **options).train()
    rates = {part.drop_prob for part in network.modules() if isinstance(part, DropPath)}
    assert len(rates) > 3
    assert compile_blocks(network, backend=count, fullgraph=True) is network
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    torch.compiler.reset()
    return graphs


@pytest.mark.parametrize("name", ["mambavision_t", "eradio_nano"])
def test_a_network_of_compiled_blocks_is_the_same_function(name):
    plain = zoo.create_model(name, depths=(1, 1, 3, 2), drop_path_rate=0.0).train().double()
    compiled = compile_blocks(copy.deepcopy(plain), backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(4, 3, 64, 64, dtype=torch.double)
    outs = [network(images) for network in (plain, compiled)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-8)
    for out in outs:
        out.square().mean().backward()
    for mine, his in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, his.grad, rtol=1e-6, atol=1e-8)


def test_a_copy_is_not_compiled():
    network = compile_blocks(timm.create_model("test_vit"), backend="eager")
    assert all(block._compiled_call_impl is not None for block in network.blocks)
    assert all(block._compiled_call_impl is None for block in copy.deepcopy(network).blocks)


def drop(part: nn.Module, count: int) -> torch.Tensor:
    """Return what is left of ones, a number a sample."""
    torch.manual_seed(0)
    return part.train()(torch.ones(count, 3, 2))[:, 0, 0]


def test_without_a_compiler_drop_path_is_timms():
    assert torch.equal(drop(SharedDropPath(0.3), 64), drop(DropPath(0.3), 64))
    ones = torch.ones(8, 3)
    assert torch.equal(SharedDropPath(0.3).eval()(ones), ones)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_one_graph_drops_at_each_modules_own_rate(rate, dtype):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    call = torch.compile(lambda part, x: part(x), backend=count, fullgraph=True, dynamic=False)
    ones = torch.ones(50_000, 3, dtype=dtype)
    for prob in (rate, rate / 2):
        left = call(SharedDropPath(prob).to(dtype).train(), ones)
        assert torch.equal(left[:, 0], left[:, 2])
        values = left[:, 0].unique()
        torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - prob)], dtype=dtype))
        share = (left[:, 0] > 0).double().mean().item()
        assert abs(share - (1 - prob)) < 4.5 * (prob * (1 - prob) / len(ones)) ** 0.5
    assert len(graphs) == 1


def test_nothing_is_left_of_a_path_that_always_drops_and_scaling_may_be_left_out():
    call = torch.compile(lambda part, x: part(x), backend="eager", dynamic=False)
    ones = torch.ones(64, 3)
    assert call(SharedDropPath(1.0).train(), ones).count_nonzero() == 0
    left = call(SharedDropPath(0.5, scale_by_keep=False).train(), ones)
    assert left.unique().tolist() == [0, 1]


def test_a_network_without_storage_computes_its_rates_when_it_gets_some():
    with torch.device("meta"):
        part = SharedDropPath(0.25)
    part = part.to_empty(device="cpu")
    part.init_non_persistent_buffers()
    assert part.keep.item() == 0.75 * 2**24 and not part.state_dict()
