import math

import pytest
import torch

from zoo.train.losses import (
    SPATIAL_LOSSES,
    adaloss,
    cosine,
    hybrid,
    mse,
    smooth_l1,
    summary_loss,
)


def one_map(*vectors):
    return torch.tensor(vectors)[None, None]


def test_the_summary_loss_is_the_mean_cosine_distance():
    ours = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    theirs = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-4.0, 0.0]])
    expected = (0 + (1 - math.sqrt(0.5)) + 2) / 3
    assert summary_loss(ours, theirs).item() == pytest.approx(expected, abs=1e-6)


def test_the_spatial_losses_are_the_numbers_worked_out_by_hand():
    ours = one_map([3.0, 4.0], [0.0, 1.0])
    theirs = one_map([3.0, 0.0], [0.5, 1.0])
    distances = (1 - 3 / 5), (1 - 1 / math.sqrt(1.25))
    assert cosine(ours, theirs).item() == pytest.approx(sum(distances) / 2, abs=1e-6)
    assert mse(ours, theirs).item() == pytest.approx((16 + 0.25) / 4)
    huber = (4 - 0.5) + 0.5 * 0.25
    assert smooth_l1(ours, theirs).item() == pytest.approx(huber / 4)
    assert smooth_l1(ours, theirs, beta=2.0).item() == pytest.approx((4 - 1 + 0.25 / 4) / 4)
    expected = 0.9 * sum(distances) / 2 + 0.1 * huber / 4
    assert hybrid(ours, theirs).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", SPATIAL_LOSSES.values(), ids=SPATIAL_LOSSES)
def test_every_spatial_loss_is_zero_at_the_target_and_falls_towards_it(loss):
    theirs = torch.randn(2, 3, 5, 4)
    ours = torch.randn(2, 3, 5, 4, requires_grad=True)
    before = loss(ours, theirs)
    assert before.shape == ()
    (gradient,) = torch.autograd.grad(before, ours)
    assert loss(ours - 0.1 * gradient / gradient.norm(), theirs) < before
    assert loss(theirs, theirs).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", SPATIAL_LOSSES.values(), ids=SPATIAL_LOSSES)
def test_a_bfloat16_student_is_compared_in_float32(loss):
    theirs = torch.randn(2, 3, 5, 4)
    ours = torch.randn(2, 3, 5, 4).bfloat16()
    assert loss(ours, theirs).dtype == torch.float32
    assert torch.equal(loss(ours, theirs), loss(ours.float(), theirs))
    assert loss(ours.double(), theirs).dtype == torch.float64


@pytest.mark.parametrize("loss", [summary_loss, *SPATIAL_LOSSES.values()])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises((ValueError, TypeError)):  # the second where annotations are checked
        loss(torch.randn(4, 8), torch.randn(1, 8))


def test_adaloss_starts_from_the_first_losses_and_then_follows_slowly():
    losses = torch.tensor([2.0, 0.5], requires_grad=True)
    weights, ema = adaloss(losses, None)
    assert weights.tolist() == [0.5, 2.0]
    assert not weights.requires_grad
    assert not ema.requires_grad
    weights, later = adaloss(torch.tensor([1.0, 1.5]), ema)
    torch.testing.assert_close(later, torch.tensor([1.99, 0.51]))
    torch.testing.assert_close(weights, 1 / later)
    assert ema.tolist() == [2.0, 0.5], "the means of the step before stay as they were"


def test_adaloss_makes_losses_of_any_scale_equal_once_they_are_steady():
    losses, ema = torch.tensor([36_600.0, 1.0, 3e-5]), torch.ones(3)
    for _ in range(4000):
        weights, ema = adaloss(losses, ema)
    torch.testing.assert_close(weights * losses, torch.ones(3), rtol=1e-3, atol=0)


def test_adaloss_stays_finite_when_a_loss_is_zero():
    weights, _ = adaloss(torch.zeros(2), None)
    assert torch.isfinite(weights).all()
