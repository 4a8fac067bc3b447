"""StripedHyena 2's short convolutions and gates: operators, kernels, the same in torch."""

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import short_conv

SIZES = [(3, 49, 20, 5, 7), (2, 1, 12, 12, 3), (1, 70, 6, 1, 1), (1, 33, 264, 132, 7)]
"""Rows, tokens, channels, groups, taps of the filter."""


def inputs_of(size, *, dtype=torch.float32, device="cpu"):
    batch, length, width, groups, taps = size
    p = torch.randn(batch, length, 3 * width, device=device)
    others = torch.randn(3 * width, 3, device=device), torch.randn(groups, taps, device=device)
    return [t.to(dtype) for t in (p, *others)]


def exact(p, taps, g):
    """The same from torch's own convolutions in float64."""
    p, taps, g = (t.double() for t in (p, taps, g))
    f = F.conv1d(F.pad(p.transpose(1, 2), (2, 0)), taps[:, None], groups=len(taps))
    x2, x1, v = f.unflatten(1, (-1, 3)).unbind(2)
    u = x1 * v
    weights = g.repeat_interleave(u.shape[1] // len(g), 0).flip(1)[:, None]
    y = x2 * F.conv1d(F.pad(u, (g.shape[1] - 1, 0)), weights, groups=u.shape[1])
    return [t.transpose(1, 2) for t in (x2, u, y)]


def test_the_operators_promise_the_shapes_and_dtypes_of_their_results():
    p, taps, g = inputs_of(SIZES[0], dtype=torch.bfloat16, device="meta")
    found = (*short_conv.short_conv_gates(p, taps), short_conv.short_conv_filtered(p, taps, g))
    assert all(t.shape == (3, 49, 20) and t.dtype == p.dtype for t in found)


@pytest.mark.slow
def test_the_kernels_are_exact_in_tritons_interpreter(interpret):
    interpret(__file__)


def run_interpreted():
    """Run the kernels on the CPU: walks of all lengths, more channels than a program's."""
    from zoo.kernels.gated_conv_triton import filtered, gates

    torch.manual_seed(0)
    for size in SIZES:
        p, taps, g = inputs_of(size)
        found = (*gates(p, taps), filtered(p, taps, g))
        for ours, theirs in zip(found, exact(p, taps, g), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (2, 4099, 1920, 128, 7)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)], ids=str
)
def test_the_operators_are_exact(size, dtype, tolerance):
    p, taps, g = inputs_of(size, dtype=dtype, device="cuda")
    found = (*short_conv.short_conv_gates(p, taps), short_conv.short_conv_filtered(p, taps, g))
    for ours, theirs in zip(found, exact(p, taps, g), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [3, 40])
def test_a_layer_and_its_state_are_the_same_by_kernels_and_in_torch(length):
    pytest.importorskip("transformers")
    from zoo.language.hyena import HyenaConfig, LongHyena, MediumHyena, ShortHyena
    from zoo.language.hyena_cache import LayerState

    sizes = dict(hidden_size=32, num_attention_heads=2, se_groups=4, mr_groups=4)
    config = HyenaConfig(pattern="sml", **sizes)
    for kind in (ShortHyena, MediumHyena, LongHyena):
        operator = kind(config).cuda().requires_grad_(False)
        operator.start(0.1)
        p, outputs = torch.randn(2, length + 1, 96, device="cuda"), []
        for operator.uses_kernels in (True, False):
            state = LayerState()
            first = operator.mix(p[:, :-1], state)
            outputs.append(torch.cat([first, operator.mix(p[:, -1:], state)], dim=1))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    run_interpreted()
