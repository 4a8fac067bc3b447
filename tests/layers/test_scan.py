import pytest
import torch
import torch.nn.functional as F

from zoo.layers.scan import selective_scan


def scan_by_steps(x, delta, A, B, C, D):
    """The definition, one token after the other."""
    state = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        state = decay * state + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1)


def random_inputs(batch, length, chs, states, dtype=torch.float64):
    x, B, C = (torch.randn(batch, length, n, dtype=dtype) for n in (chs, states, states))
    delta = torch.rand(batch, length, chs, dtype=dtype)
    A = -8 * torch.rand(chs, states, dtype=dtype)
    return x, delta, A, B, C, torch.randn(chs, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 3, 13, 49, 50, 196])
def test_the_scan_equals_the_recurrence_taken_step_by_step(length):
    inputs = random_inputs(2, length, 5, 3)
    torch.testing.assert_close(
        selective_scan(*inputs), scan_by_steps(*inputs), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("chunk", [1, 4, 10, 37, 50])
def test_the_chunk_changes_nothing(chunk):
    inputs = random_inputs(1, 37, 4, 8)
    torch.testing.assert_close(
        selective_scan(*inputs, chunk=chunk), scan_by_steps(*inputs), rtol=1e-10, atol=1e-12
    )


def test_the_skip_may_be_left_out():
    *inputs, _ = random_inputs(2, 9, 4, 2)
    torch.testing.assert_close(selective_scan(*inputs), scan_by_steps(*inputs, torch.zeros(4)))


def test_the_gradient_of_every_input_is_the_numerical_one():
    inputs = [t.requires_grad_() for t in random_inputs(2, 7, 3, 2)]
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def scan(*args):
        return selective_scan(*args[:-1], delta_bias=args[-1], delta_softplus=True, chunk=3)

    assert torch.autograd.gradcheck(scan, (*inputs, bias))


def test_bias_and_softplus_may_be_done_inside():
    x, delta, A, B, C, D = random_inputs(2, 11, 4, 3)
    delta, bias = delta - 2, torch.randn(4, dtype=torch.float64)
    inside = selective_scan(x, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    torch.testing.assert_close(
        inside, selective_scan(x, F.softplus(delta + bias), A, B, C, D), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_huge_steps_overflow_neither_forward_nor_backward(size):
    x, delta, A, B, C, D = random_inputs(1, 40, 3, 4, torch.float32)
    inputs = [t.requires_grad_() for t in (x / size, delta * size, A, B, C, D)]
    y = selective_scan(*inputs)
    torch.testing.assert_close(y, scan_by_steps(*inputs))
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


def test_a_step_of_zero_passes_a_token_over():
    x, delta, A, B, C, D = random_inputs(1, 12, 3, 4)
    delta[:, 5] = 0
    kept = [i for i in range(12) if i != 5]
    without = selective_scan(x[:, kept], delta[:, kept], A, B[:, kept], C[:, kept], D)
    torch.testing.assert_close(selective_scan(x, delta, A, B, C, D)[:, kept], without)


def test_bfloat16_is_rounded_only_at_the_end():
    x, delta, A, B, C, D = random_inputs(2, 196, 8, 8, torch.bfloat16)
    y = selective_scan(x, delta, A, B, C, D)
    exact = selective_scan(*(t.double() for t in (x, delta, A, B, C, D)))
    assert y.dtype == torch.bfloat16
    # One unit in the last place; a state kept in bfloat16 would be tens of them off.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


def test_autocast_leaves_the_accumulation_in_float32():
    inputs = random_inputs(2, 30, 4, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(*inputs)
    assert torch.equal(y, selective_scan(*inputs))


@pytest.mark.slow
def test_the_exported_graph_grows_with_the_root_of_the_length():
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return selective_scan(*inputs)

    def num_nodes(length):
        inputs = random_inputs(1, length, 2, 2)
        return len(torch.export.export(Scan(), inputs).graph.nodes)

    short, long = num_nodes(64), num_nodes(1024)
    assert long < 4.5 * short
    assert long < 1024
