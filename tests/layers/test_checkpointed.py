"""Recomputing a block must change nothing but the memory."""

import copy

import pytest
import torch
from torch import nn

from zoo.layers.checkpointed import checkpointed


@pytest.fixture
def block():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5)
    ).train()


def _train(run, block, x):
    torch.manual_seed(1)
    out = run(block, x)
    out.square().sum().backward()
    return out, [p.grad for p in block.parameters()], list(block.buffers())


def test_recomputing_gives_the_same_output_gradients_and_statistics(block):
    x = torch.randn(5, 3, 6, 6)
    plain = _train(lambda b, x: b(x), copy.deepcopy(block), x)
    again = _train(checkpointed, block, x)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_recomputing_keeps_only_the_input(block):
    kept, x = [], torch.randn(5, 3, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        checkpointed(block, x)
    others = [t for t in kept if t.shape != x.shape or not t.equal(x)]
    assert len(others) < len(kept)
    assert not sum(t.numel() for t in others)  # torch 2.11 also keeps an empty one


def test_batch_norms_are_as_before_even_when_the_second_run_fails(block):
    runs = []

    def fails_the_second_time(*_):
        runs.append(len(runs))
        if len(runs) > 1:
            raise RuntimeError("second run")

    block[2].register_forward_hook(fails_the_second_time)
    out = checkpointed(block, torch.randn(5, 3, 6, 6))
    with pytest.raises(RuntimeError, match="second run"):
        out.sum().backward()
    assert block[1].momentum == 0.3
    assert block[1].num_batches_tracked == 1
    assert [name for name, _ in block.named_buffers()] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
