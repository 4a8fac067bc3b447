"""The average of the weights: what it holds of each step, and of spectral norms."""

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.layers import spectral
from zoo.train.average import AGE, Average
from zoo.train.config import Optim, Training
from zoo.train.loop import update
from zoo.train.state import TrainState


def shares(steps: int, decay: float | str = "auto") -> torch.Tensor:
    """What the weights of step 0 (the initial ones), 1, 2, ... count in the average at the end."""
    count = nn.Module()
    count.register_buffer("seen", F.one_hot(torch.tensor(0), steps + 1).double())
    average = Average(_with_parameter(count), decay)
    for step in range(1, steps + 1):
        count.seen.copy_(F.one_hot(torch.tensor(step), steps + 1))
        average.update(count, step)
    return average.module.seen


def _with_parameter(module: nn.Module) -> nn.Module:
    module.register_parameter("one", nn.Parameter(torch.ones(())))
    return module


@pytest.mark.parametrize("steps", [20, 100, 1000])
@pytest.mark.parametrize("decay", ["auto", 0.999, 0.99996])
def test_nothing_of_the_initial_weights_is_left_whatever_the_length(steps, decay):
    found = shares(steps, decay)
    assert found[0] == 0
    assert found.sum().item() == pytest.approx(1)
    assert found[: steps // 2].sum() < 1e-4


@pytest.mark.parametrize("steps", [100, 1000])
def test_the_mean_age_is_the_same_share_of_a_run_of_any_length(steps):
    ages = torch.arange(steps, -1, -1, dtype=torch.float64)
    assert (shares(steps) @ ages).item() == pytest.approx(AGE * (steps - 1), rel=1e-9)


def test_the_shares_are_the_published_power_profile():
    """Karras et al. (2312.02696, 3.1) weigh step s by s^γ; so do we, but early on."""
    steps, gamma = 2000, 1 / AGE - 2
    profile = torch.arange(steps + 1, dtype=torch.float64) ** gamma
    torch.testing.assert_close(shares(steps), profile / profile.sum(), rtol=0.1, atol=1e-6)


def test_a_decay_bounds_the_memory_as_it_does_in_the_papers():
    late = shares(1000, 0.9)
    expected = 0.1 * 0.9 ** torch.arange(1000, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(late[500:], expected[500:], rtol=1e-9, atol=0)


class Net(nn.Module):
    """Layers of a block, the first of which stacks three parts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.fc, self.out = nn.Linear(16, 48), nn.Linear(48, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.tanh(self.qkv(x)))))

    def effective(self):
        return [layer.weight.detach().clone() for layer in (self.qkv, self.fc, self.out)]


@pytest.fixture(scope="module")
def trained():
    """Averages of a spectral net at a constant rate, each with the average of effective weights."""
    torch.manual_seed(0)
    target, net = Net(), spectral.reparametrise(Net())
    averages = dict(plain=ModelEmaV3(net, decay=0.995), ours=Average(net))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.03, weight_decay=0.02)
    means = {name: net.eval().effective() for name in averages}
    for step in range(1, 601):
        x = torch.randn(16, 16)
        (net.train()(x) - target(x) - torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = net.eval().effective()  # looking takes no step of power iteration
        for name, average in averages.items():
            share = 1 - average.get_decay(step)
            means[name] = [m.lerp(w, share) for m, w in zip(means[name], now, strict=True)]
            average.update(net, step)
    return {name: (average.module, means[name]) for name, average in averages.items()}


def inflation(net: Net, mean: list[torch.Tensor]) -> list[float]:
    return [(w.norm() / m.norm()).item() for w, m in zip(net.effective(), mean, strict=True)]


def test_the_average_of_a_spectral_student_has_the_norm_of_its_averaged_weights(trained):
    assert max(inflation(*trained["plain"])) > 3  # averaged singular vectors are short
    assert inflation(*trained["ours"]) == pytest.approx([1, 1, 1], abs=0.03)


def test_a_checkpoint_with_averaged_singular_vectors_is_put_right(trained):
    (plain, mean), (ours, _) = trained["plain"], trained["ours"]
    old = Average(ours)
    old.load(plain.state_dict())
    assert inflation(old.module, mean) == pytest.approx([1, 1, 1], abs=0.15)
    # what is right is loaded to the bit
    again = Average(plain)
    again.load(ours.state_dict())
    assert all(map(torch.equal, again.module.state_dict().values(), ours.state_dict().values()))


@pytest.mark.parametrize("steps", [100, 1000])
def test_the_average_is_no_worse_than_the_last_weights_at_any_length(steps):
    """A student of a wider network, with noise on its targets and the loop's own schedule."""
    torch.manual_seed(1)
    teacher, student = Wide(64), Wide(24)
    config = Training(steps=steps, optim=Optim(lr=3e-3))
    state, plain = TrainState.of(student, config.optim), ModelEmaV3(student, decay=0.999)
    for _ in range(steps):
        x = torch.randn(64, 16)
        loss = (student(x) - teacher(x) - torch.randn(64, 4)).square().mean()
        loss.backward()
        update(state, dict(loss=loss), config)
        plain.update(student, state.step)
    x = torch.randn(4096, 16)
    with torch.no_grad():
        errors = {
            name: (model(x) - teacher(x)).square().mean().item()
            for name, model in dict(state.forms, plain=plain.module).items()
        }
    assert errors["average"] < 1.02 * errors["raw"]
    assert errors["plain"] > 1.3 * errors["raw"]  # a constant decay, of 0.999


class Wide(nn.Sequential):
    """One hidden layer."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 4))


class NoReading(TorchDispatchMode):
    """Whatever would wait for a GPU to know a value raises here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in func.name(), f"{func} would wait"
        return func(*args, **(kwargs or {}))


def test_bringing_the_average_on_reads_nothing_from_the_device():
    net = spectral.reparametrise(Net())
    average = Average(net)
    with NoReading():
        for step in range(1, 4):
            average.update(net, step)
