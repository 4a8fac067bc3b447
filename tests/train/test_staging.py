"""A device copies a state beside training: whenever it does, checkpoints hold the right moment.

`Late` stands for a GPU whose side stream has done nothing yet when something waits for it, or gets
its turn in a forward pass.
"""

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from zoo.train.checkpoint import SMALL, Saver, split
from zoo.train.config import Every, Optim, Training
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.staging import Staging, pinned_like
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class Late(Staging):
    """Copies when it is waited for, and not before."""

    last: ClassVar[Any] = None

    def __init__(self):
        super().__init__()
        self._there, self._left = threading.Event(), None
        Late.last = self

    def copy(self, tensors):
        memory = pinned_like(tensors)
        self._there.clear()
        self._left = memory, tensors
        return memory

    def hold(self):
        if self._left is not None:
            (memory, tensors), self._left = self._left, None
            for name, x in tensors.items():
                memory[name].copy_(x)
            self._there.set()

    def wait(self):
        assert self._there.wait(60)


@pytest.fixture
def late(monkeypatch):
    """Let states be copied late; a save that is waited for is copied then."""
    wait = Saver.wait

    def waits(saver):
        saver._writer.staging.hold()
        wait(saver)

    monkeypatch.setattr("zoo.train.checkpoint.Staging", Late)
    monkeypatch.setattr(Saver, "wait", waits)
    monkeypatch.setattr(Late, "last", None)


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    kind: ClassVar[str] = "late"


class Moving(nn.Module):
    """A model of which a forward pass changes statistics, a counter, and a queue that is large.

    Args:
        meanwhile: Called in each forward pass.
    """

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile = meanwhile
        self.norm, self.layer = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("queue", torch.zeros(SMALL // 4, 6))
        self.register_buffer("seen", torch.tensor(0))
        self.wide = nn.Linear(SMALL // 256 + 1, 256, bias=False)

    def forward(self, x):
        with torch.no_grad():
            self.queue[self.seen : self.seen + len(x)] = x
            self.seen += len(x)
        self.meanwhile()
        return self.layer(self.norm(x)) * (1 + self.wide.weight.sum())


class Weighted(nn.Module):
    """A learned weight of a loss, and a mean of losses that the next step reads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("running", torch.zeros(()))


class Squares(Task):
    def __init__(self, part):
        self.part = part

    def losses(self, state, batch, targets, step):
        y = state.model(batch)
        return dict(square=Loss((y - 1).square().mean() * len(batch), len(batch)))

    def weigh(self, shares, step):
        return shares["square"] * self.part.weight.exp() / (1 + self.part.running)

    def observe(self, means, step):
        self.part.running.lerp_(means["square"], 0.5)


class Noise:
    slices = (0, 1)

    def batches(self, start, steps):
        draw = torch.Generator().manual_seed(start)
        return (torch.randn(4, 6, generator=draw) for _ in range(2 * (steps - start)))

    def counts(self, step):
        return dict(square=8)

    def keys(self, step):
        return []

    def skipped(self):
        return []


def nothing():
    pass


def checkpoints_of(out, slices, damp, meanwhile=nothing):
    config = Settings(
        steps=6, batch=8, slices=slices, device="cpu", out=out, keep=9,
        every=Every(log=2, checkpoint=1, evaluate=10**9),
        optim=Optim(lr=0.1, ema=0.9, damp=damp),
    )  # fmt: skip
    torch.manual_seed(0)
    part = Weighted()
    state = TrainState.of(Moving(meanwhile), config.optim, parts=dict(part=part))
    feed = Noise()
    feed.slices = tuple(range(slices))
    run = Run.create(config)
    train(Squares(part), state, feed, config, run)
    return [split(run.load(step=step))[0] for step in range(1, 7)]


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("early", [False, True], ids=["behind it", "in a forward pass"])
def test_a_checkpoint_that_is_copied_while_the_next_step_runs_holds_the_step_before(
    tmp_path, request, slices, damp, early
):
    expected = checkpoints_of(tmp_path / "at-once", slices, damp)
    request.getfixturevalue("late")
    meanwhile = (lambda: Late.last.hold()) if early else nothing
    found = checkpoints_of(tmp_path / "late", slices, damp, meanwhile)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        assert ours.keys() == theirs.keys()
        other = [name for name, x in theirs.items() if not torch.equal(ours[name], x)]
        assert not other, f"of another moment in step {step}: {other}"


def test_what_is_on_another_device_is_copied_to_the_host():
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        Staging().copy(dict(w=torch.ones(2, device="meta")))
    w = torch.ones(2)
    copied = Staging().copy(dict(w=w))["w"]
    w.zero_()
    assert copied.sum() == 2
