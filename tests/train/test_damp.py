import pytest
import torch
from torch import nn

from zoo.train.damp import damped


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 2))


def test_weights_are_noisy_inside_and_plain_to_the_bit_outside():
    net = model()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    with damped(net, 0.1):
        inside = {name: p.clone() for name, p in net.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == {"0.weight", "3.weight"}
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())


def test_the_noise_multiplies_by_one_on_average_with_the_deviation_asked_for():
    net = nn.Linear(500, 400, bias=False)
    plain = net.weight.detach().clone()
    with damped(net, 0.2):
        noise = (net.weight / plain).detach()
    assert noise.mean().item() == pytest.approx(1, abs=0.005)
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)


def test_the_gradient_is_that_of_the_loss_as_a_function_of_the_plain_weights():
    net, x = model(), torch.randn(2, 3, 4, 4)
    torch.manual_seed(3)
    with damped(net, 0.3):
        net(x).square().sum().backward()
    found = [p.grad.clone() for p in net.parameters()]
    torch.manual_seed(3)
    plain = dict(net.named_parameters())
    noisy = dict(plain)
    for name in ("0.weight", "3.weight"):
        noisy[name] = plain[name] * (1 + 0.3 * torch.randn_like(plain[name]))
    loss = torch.func.functional_call(net, noisy, (x,)).square().sum()
    for mine, exact in zip(found, torch.autograd.grad(loss, plain.values()), strict=True):
        torch.testing.assert_close(mine, exact)


def test_without_noise_nothing_is_drawn():
    net = model()
    state = torch.get_rng_state()
    with damped(net, 0.0):
        pass
    assert torch.equal(state, torch.get_rng_state())


def test_an_error_inside_gives_the_weights_back():
    net = model()
    before = net[3].weight.detach().clone()
    with pytest.raises(RuntimeError, match="broken"), damped(net, 0.5):
        raise RuntimeError("broken")
    assert torch.equal(net[3].weight, before)
