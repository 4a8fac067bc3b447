"""GELU in the form that a compiler gets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.layers.gelu import GELU, fusable_gelu, normal


def test_the_distribution_is_within_1e_7():
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    cdf, density = normal(z)
    exact = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    assert (cdf - torch.special.ndtr(z)).abs().max() < 1e-7
    torch.testing.assert_close(density, exact.log_prob(z).exp(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_gives_the_values_and_slopes_of_torchs(backend):
    x = torch.linspace(-8, 8, 999, requires_grad=True)
    compiled = torch.compile(fusable_gelu, backend=backend, fullgraph=True)
    y = compiled(x)
    exact = x.detach().double().requires_grad_()
    wanted = F.gelu(exact)
    slopes = [torch.autograd.grad(out.sum(), at)[0] for out, at in ((y, x), (wanted, exact))]
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=0, atol=2e-6)


def test_elsewhere_it_is_torchs():
    x = torch.randn(50)
    assert torch.equal(GELU()(x), nn.GELU()(x))
    assert isinstance(GELU(), nn.GELU)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_a_compiler_is_given_the_polynomial_in_16_bits(dtype):
    targets = []

    def record(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(GELU(), backend=record)(torch.randn(9, device="cuda", dtype=dtype))
    assert any("exp2" in name for name in targets) == (dtype == torch.bfloat16)


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_one_rounds_as_torchs_does():
    x = torch.randn(1000, device="cuda").mul(3).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, wanted = torch.compile(GELU(), fullgraph=True)(x), F.gelu(exact)
    slopes = [torch.autograd.grad(out.sum(), at)[0] for out, at in ((y, x), (wanted, exact))]
    for ours, theirs in ((y, wanted), (slopes[0], slopes[1])):
        assert (ours.double() - theirs).norm() < 3e-3 * theirs.norm()
