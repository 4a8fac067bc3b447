"""The scan's kernels against plain torch in float64, and what a compiler sees of them."""

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import available as fused
from zoo.kernels import scan as scan_op
from zoo.layers.scan import selective_scan


def random_inputs(
    batch, length, chs, states, dtype=torch.bfloat16, device="cuda", channels_first=False
):
    """Make inputs as a mixer does: B and C are slices, A, D and the bias stay in float32."""
    x, delta = torch.randn(2, batch, length, chs, device=device)
    B, C = torch.randn(batch, length, 2 * states + 1, device=device).to(dtype)[..., 1:].chunk(2, -1)
    A = -8 * torch.rand(chs, states, device=device)
    D, bias = torch.randn(2, chs, device=device)
    x, delta = x.to(dtype), (delta - 1).to(dtype)
    if channels_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return [t.detach().requires_grad_() for t in (x, delta, A, B, C, D, bias)]


def scan(inputs, **options):
    *inputs, bias = inputs
    return selective_scan(*inputs, delta_bias=bias, delta_softplus=True, **options)


def results(inputs, dy, **options):
    y = scan(inputs, **options)
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def assert_exact(inputs, tolerance=1e-3):
    """Output and gradients are those of float64 but for the rounding to their own dtype."""
    dy = torch.randn_like(inputs[0])
    exact = results([t.detach().double().requires_grad_() for t in inputs], dy)
    for ours, theirs in zip(results(inputs, dy), exact, strict=True):
        off = (ours.double() - theirs.to(ours.dtype).double()).norm()
        assert off <= tolerance * theirs.norm() + 1e-12


def test_the_operator_promises_the_shapes_and_dtypes_of_its_results():
    inputs = random_inputs(2, 17, 10, 5, device="meta")
    y, saved_states = scan_op.scan(*inputs, True, True)
    assert (y.shape, y.dtype) == ((2, 17, 10), torch.bfloat16)
    assert (saved_states.shape, saved_states.dtype) == ((2, 3, 80), torch.float32)
    for t, grad in zip(inputs, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


def test_without_gradients_no_state_is_kept():
    _, saved_states = scan_op.scan(*random_inputs(2, 17, 10, 5, device="meta"), True, False)
    assert saved_states.numel() == 0


def test_a_sequence_whose_channels_lie_gigabytes_apart_is_copied():
    pytest.importorskip("triton", reason="Triton is not there")
    from zoo.kernels.scan_triton import _strided

    def strides(length):
        x = torch.empty(1, 2048, length, dtype=torch.bfloat16, device="meta").mT
        return _strided(x)[1:]

    assert strides(2**18) == (2**29, 1, 2**18)
    assert strides(2**19) == (2**30, 2048, 1)


@pytest.mark.slow
def test_nothing_but_a_scan_on_a_gpu_imports_the_kernels():
    code = "import sys, zoo.layers.scan; print('zoo.kernels.scan_triton' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.strip() == b"False"


@pytest.mark.slow
def test_the_kernels_are_exact_in_tritons_interpreter(interpret):
    interpret(__file__)


def run_interpreted():
    """Run the kernels on the CPU: odd sizes, every number of lanes a channel, segments."""
    from zoo.kernels.scan_triton import ScanPlan, backward, forward

    torch.manual_seed(0)
    for sizes, plan in (
        ((2, 9, 9, 3), ScanPlan(4, 1, 16)),
        ((1, 20, 5, 8), ScanPlan(1, 2, 16)),
        ((1, 9, 5, 8), ScanPlan(2, 1, 16)),
        ((1, 3, 5, 4), ScanPlan(2, 1, 8)),
    ):
        inputs = random_inputs(*sizes, dtype=torch.float32, device="cpu")
        dy = torch.randn_like(inputs[0])
        exact = results([t.detach().double().requires_grad_() for t in inputs], dy)
        inputs = [t.detach() for t in inputs]
        y, saved_states = forward(*inputs, delta_softplus=True, save=True, plan=plan)
        grads = backward(dy, *inputs, saved_states, delta_softplus=True, plan=plan)
        for ours, theirs in zip((y, *grads), exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        for sizes, plan in (
            ((2, 11, 36, 8), ScanPlan(2, 1, 16, 2)),
            ((1, 24, 20, 5), ScanPlan(4, 2, 16, 2)),
        ):
            inputs = [t.detach() for t in random_inputs(*sizes, dtype=dtype, device="cpu")]
            one = forward(*inputs, delta_softplus=True, save=True, plan=plan._replace(channels=1))
            for save in (False, True):
                y, saved_states = forward(*inputs, delta_softplus=True, save=save, plan=plan)
                assert torch.equal(y, one[0])
            assert torch.equal(saved_states, one[1])


@pytest.mark.gpu
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_any_shape_gives_the_output_and_gradients_of_float64(batch, length, chs, channels_first):
    assert_exact(random_inputs(batch, length, chs, 8, channels_first=channels_first))


@pytest.mark.gpu
@pytest.mark.parametrize("states", [1, 3, 16, 24])
def test_any_number_of_states_is_exact(states):
    assert_exact(random_inputs(2, 37, 20, states))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float32, 1e-5)], ids=str
)
def test_the_other_dtypes_are_exact(dtype, tolerance):
    assert_exact(random_inputs(2, 50, 20, 8, dtype), tolerance)


@pytest.mark.gpu
def test_many_sequences_are_exact():
    assert_exact(random_inputs(700, 20, 100, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_channels_at_once_give_the_same_bits_as_one(dtype):
    from zoo.kernels.scan_triton import ScanPlan, forward

    inputs = [t.detach() for t in random_inputs(2, 37, 46, 8, dtype)]
    (y, saved_states), (z, others) = (
        forward(*inputs, delta_softplus=True, save=True, plan=ScanPlan(2, 1, 40, channels))
        for channels in (1, 2)
    )
    assert torch.equal(y, z) and torch.equal(saved_states, others)
    # Without states to keep it is another program, in which products may join other sums.
    z, _ = forward(*inputs, delta_softplus=True, save=False, plan=ScanPlan(2, 1, 40, 2))
    torch.testing.assert_close(z, y, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
def test_one_long_sequence_in_segments_is_exact():
    assert_exact(random_inputs(1, 1111, 10, 8))


@pytest.mark.gpu
def test_skip_and_bias_may_be_left_out():
    x, delta, A, B, C, _, _ = random_inputs(2, 21, 12, 8)
    delta = delta.detach().float().exp().bfloat16()  # positive without a softplus
    with torch.no_grad():
        y = selective_scan(x, delta, A, B, C)
        exact = selective_scan(*(t.double() for t in (x, delta, A, B, C)))
    torch.testing.assert_close(y.double(), exact.bfloat16().double(), rtol=2**-7, atol=1e-4)


@pytest.mark.gpu
def test_a_raw_step_of_minus_infinity_passes_a_token_over():
    inputs = random_inputs(1, 12, 3, 4)
    with torch.no_grad():
        inputs[1][:, 5] = -torch.inf
        inputs[0][:, 5] = 0
    kept = [i for i in range(12) if i != 5]
    without = [t[:, kept] if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]
    y, *grads = results(inputs, torch.ones_like(inputs[0]))
    assert torch.equal(y[:, kept], scan(without))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.gpu
def test_huge_steps_overflow_neither_forward_nor_backward():
    inputs = random_inputs(1, 40, 3, 4, torch.float32)
    with torch.no_grad():
        inputs[1].mul_(1e30)
        inputs[0].mul_(1e-30)
    assert all(t.isfinite().all() for t in results(inputs, torch.ones_like(inputs[0])))


@pytest.mark.gpu
def test_the_gradients_are_the_same_bits_each_time():
    inputs, dy = random_inputs(16, 196, 160, 8), torch.randn(16, 196, 160, device="cuda").bfloat16()
    first, second = results(inputs, dy), results(inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_compiled_scan_is_one_graph_with_one_node_and_the_same_numbers():
    inputs, dy = random_inputs(2, 49, 20, 8), torch.randn(2, 49, 20, device="cuda").bfloat16()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(scan, backend=keep, fullgraph=True)(inputs)
    assert str(graphs[0].code).count("ops.zoo.selective_scan") == 1
    compiled = torch.compile(scan, fullgraph=True)
    y = compiled(inputs)
    ours = [y, *torch.autograd.grad(y, inputs, dy)]
    assert all(torch.equal(a, b) for a, b in zip(ours, results(inputs, dy), strict=True))


@pytest.mark.gpu
def test_export_sees_one_node():
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return scan(inputs)

    exported = torch.export.export(Scan(), tuple(t.detach() for t in random_inputs(2, 49, 20, 8)))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("zoo.selective_scan.default") == 1


@pytest.mark.gpu
def test_autocast_changes_nothing():
    inputs = random_inputs(2, 30, 20, 8, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = scan(inputs)
    assert torch.equal(y, scan(inputs))


@pytest.mark.gpu
def test_the_operator_keeps_what_torch_asks_of_operators():
    inputs = random_inputs(2, 20, 12, 8, torch.float32)
    torch.library.opcheck(torch.ops.zoo.selective_scan.default, (*inputs, True, True))


@pytest.mark.gpu
def test_a_gpu_without_triton_is_warned_of_once_and_scans_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    fused._warn_once.cache_clear()
    inputs = random_inputs(2, 20, 12, 8)
    with caplog.at_level(logging.WARNING):
        assert_exact(inputs)
        scan(inputs)
    assert len([record for record in caplog.records if "Triton" in record.message]) == 1


if __name__ == "__main__":
    run_interpreted()
