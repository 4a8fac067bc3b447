"""Learned masks: where they begin, how their noise falls, and what is minimised."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from zoo.students.prune.nm import Pattern
from zoo.train.config import Training
from zoo.train.masks import LearnedMask, MaskTask, learn_masks
from zoo.train.task import Loss, Task

TWO = Pattern(2, 4)


class Nothing(Task):
    """A loss of 0 that reads the masked weight."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def losses(self, state: Any, batch: Any, targets: Any, step: int) -> dict[str, Loss]:
        return {"nothing": Loss(0 * self.layer.weight.sum(), 1)}


def task_of(layer: nn.Linear, steps: int, **options: float) -> MaskTask:
    config: Any = SimpleNamespace(steps=steps, num_slices=1)
    return MaskTask(Nothing(layer), {"layer": layer}, cast(Training, config), **options)


def test_scale_and_temperature_go_in_a_line_from_the_papers_first_to_its_last_value():
    """2409.17481, section 4.1: kappa from 1e2 to 5e2 and tau from 4 to 0.05 over all steps."""
    layer = nn.Linear(8, 4)
    mask = learn_masks({"layer": layer}, TWO)["layer"]
    task, found = task_of(layer, steps=2001), {}
    for step in (0, 500, 1000, 2000):
        task.losses(cast(Any, None), None, None, step)
        found[step] = (mask.kappa, mask.tau)
    expected = {0: (100, 4), 500: (200, 3.0125), 1000: (300, 2.025), 2000: (500, 0.05)}
    for step, values in expected.items():
        assert found[step] == pytest.approx(values)


def test_a_prior_raises_the_logits_by_how_many_weights_the_masks_share():
    """Section 3.3, alpha 3: for 2:4 the agreement less 1 is 1 for the mask, -1 for the opposite."""
    torch.manual_seed(0)
    mask = LearnedMask(torch.ones(64, 16), TWO)
    before = mask.logits.detach().clone()
    prior = torch.tensor([0.0, 1, 1, 0]).repeat(64, 4)
    mask.prefer(prior)
    raised = (mask.logits - before) / before.std()
    same = (mask.masks == torch.tensor([0.0, 1, 1, 0])).all(1)
    opposite = (mask.masks == torch.tensor([1.0, 0, 0, 1])).all(1)
    torch.testing.assert_close(raised[:, same], torch.full((256, 1), 3.0))
    torch.testing.assert_close(raised[:, opposite], torch.full((256, 1), -3.0))
    torch.testing.assert_close(raised[:, ~(same | opposite)], torch.zeros(256, 4))


def test_the_regulariser_alone_learns_to_keep_the_largest_weights():
    """Section 3.3: less lambda times the squares of what stays, so magnitude is its optimum."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    mask = learn_masks({"layer": layer}, TWO)["layer"]
    weight = layer.parametrizations.weight.original.detach()  # pyright: ignore
    task, optimizer = task_of(layer, 300, weight_reg=1.0), torch.optim.Adam([mask.logits], lr=1e-3)
    for step in range(300):
        losses = task.losses(cast(Any, None), None, None, step)
        total = task.weigh({name: loss.total for name, loss in losses.items()}, step)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    kept = mask.masks[mask.logits.argmax(-1)].view(16, 32) * weight
    best = TWO.mask(weight.abs()) * weight  # of which random masks keep two thirds
    assert kept.square().sum() > 0.95 * best.square().sum()
