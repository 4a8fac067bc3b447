from functools import partial

import pytest
import torch

from zoo.features import Batch, Features
from zoo.train.device import tensor_cores
from zoo.train.prefetch import Slice, numbered, prefetch, side_stream, tensors_of


class Counted:
    """A feed of numbers, two slices a step, of which this process takes the second one first."""

    slices = (1, 0)

    def batches(self, start, steps):
        return iter(range(2 * start, 2 * steps))


def test_slices_are_numbered_by_step_and_in_the_order_in_which_they_are_taken():
    found = list(numbered(Counted(), 3, 5))
    assert found == [Slice(3, 1, 6), Slice(3, 0, 7), Slice(4, 1, 8), Slice(4, 0, 9)]


def test_every_slice_comes_once_in_order_with_its_own_targets():
    autocast = partial(torch.autocast, "cpu", enabled=False)
    given = [Slice(step, 0, torch.full((2,), float(step))) for step in range(3)]
    double = lambda batch, step: {"twice": 2 * batch, "step": step}  # noqa: E731
    found = list(prefetch(given, double, autocast))
    assert [part for part, _ in found] == given
    assert [targets["step"] for _, targets in found] == [0, 1, 2]
    assert all(torch.equal(t["twice"], 2 * part.batch) for part, t in found)
    assert list(prefetch([], double, autocast)) == []


def test_targets_carry_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    autocast = partial(torch.autocast, "cpu", enabled=False)
    given = [Slice(0, 0, torch.ones(2))]
    ((_, found),) = prefetch(given, lambda b, s: b * weight, autocast)
    assert not found.requires_grad


def test_every_tensor_of_targets_is_found():
    batch = Batch(torch.rand(1, 3, 8, 8))
    batch.at((4, 4))
    tree = {"a": Features(None, torch.ones(1)), "b": [torch.zeros(2), (3, torch.ones(3))]}
    assert len(list(tensors_of(tree))) == 3
    assert len(list(tensors_of(batch))) == 2  # the resized ones too


@pytest.mark.gpu
def test_on_a_gpu_targets_ahead_are_the_same_bits():
    autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    net = torch.nn.Linear(64, 64, device="cuda")
    given = [Slice(i, 0, torch.randn(32, 64, device="cuda")) for i in range(4)]
    ask = lambda batch, step: net(batch)  # noqa: E731
    stream = side_stream(torch.device("cuda"), wanted=True)
    for part, found in prefetch(given, ask, autocast, stream=stream):
        with autocast():
            assert torch.equal(found, net(part.batch))


def test_tensor_cores_are_for_the_block_alone():
    before = torch.get_float32_matmul_precision()
    with tensor_cores(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with tensor_cores(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
