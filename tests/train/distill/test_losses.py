import math

import pytest
import torch
import torch.nn.functional as F

from zoo.train.distill.losses import (
    SPATIAL_LOSSES,
    adaloss,
    angle,
    by_image,
    cosine,
    dispersion,
    hybrid,
    mse,
    running_losses,
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
    none_yet = torch.full((2,), torch.nan)
    assert adaloss(none_yet).tolist() == [1, 1]
    running = running_losses(torch.tensor([2.0, 0.5]), none_yet)
    assert adaloss(running).tolist() == [0.5, 2.0]
    later = running_losses(torch.tensor([1.0, 1.5]), running)
    torch.testing.assert_close(later, torch.tensor([1.99, 0.51]))
    torch.testing.assert_close(adaloss(later), 1 / later)
    assert running.tolist() == [2.0, 0.5], "the means of the step before stay as they were"


def test_a_loss_that_a_step_leaves_out_keeps_its_running_mean():
    running = torch.tensor([2.0, torch.nan])
    later = running_losses(torch.tensor([torch.nan, 3.0]), running)
    assert later.tolist() == [2.0, 3.0]


def test_adaloss_makes_losses_of_any_scale_equal_once_they_are_steady():
    losses, running = torch.tensor([36_600.0, 1.0, 3e-5]), torch.ones(3)
    for _ in range(4000):
        running = running_losses(losses, running)
    torch.testing.assert_close(adaloss(running) * losses, torch.ones(3), rtol=1e-3, atol=0)


def test_adaloss_stays_finite_when_a_loss_is_zero():
    assert torch.isfinite(adaloss(torch.zeros(2))).all()


def test_the_angle_loss_is_the_mean_squared_angle_over_the_dispersion():
    ours = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    theirs = torch.tensor([[5.0, 0.0], [0.0, 3.0], [-4.0, 0.0]])
    expected = (0 + (math.pi / 4) ** 2 + math.pi**2) / 3
    assert angle(ours, theirs).item() == pytest.approx(expected, rel=1e-6)
    assert angle(ours, theirs, dispersion=0.5).item() == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("distance", [1.0, 1e-3, 1e-6])
def test_the_angle_loss_and_its_gradient_are_those_of_arccos_in_float64(distance):
    theirs = torch.randn(5, 16)
    ours = (theirs + distance * torch.randn(5, 16)).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (ours, theirs)]
    sine = torch.linalg.vector_norm(  # arcsin of the part across: exact where arccos is not
        F.normalize(wide[0], dim=-1)
        - F.normalize(wide[1], dim=-1) * F.cosine_similarity(*wide, dim=-1)[:, None],
        dim=-1,
    )
    angles = torch.arccos(F.cosine_similarity(*wide, dim=-1)) if distance == 1 else sine.arcsin()
    expected = angles.square().mean()
    ours_loss = angle(ours, theirs)
    torch.testing.assert_close(ours_loss.double(), expected, rtol=1e-3, atol=1e-13)
    (slope,) = torch.autograd.grad(ours_loss, ours)
    (exact,) = torch.autograd.grad(expected, wide[0])
    # float32 inputs differ by 1e-7 of their size, which is 10 % of a distance of 1e-6
    tolerance = 1e-3 if distance > 1e-5 else 0.3
    assert (slope.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_angle_loss_has_a_finite_gradient_at_equal_and_at_opposite_vectors(sign):
    theirs = torch.randn(4, 8)
    ours = (sign * theirs).requires_grad_()
    loss = angle(ours, theirs)
    assert loss.item() == pytest.approx(0 if sign > 0 else math.pi**2, rel=1e-5)
    (slope,) = torch.autograd.grad(loss, ours)
    assert slope.isfinite().all()
    if sign > 0:
        assert slope.abs().max() == 0


def test_the_dispersion_is_that_of_its_definition_in_any_split_and_scale():
    y = torch.randn(300, 6) + 1.5
    mean = y.double().mean(0)
    cosines = (y.double() @ mean) / y.double().norm(dim=1) / mean.norm()
    expected = torch.arccos(cosines).square().mean()
    found = dispersion(y)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dispersion(7 * y), expected, rtol=1e-6, atol=0)


def test_a_student_that_always_answers_the_mean_direction_has_the_angle_loss_one():
    y = torch.randn(500, 12) + 0.7
    guess = y.mean(0).expand_as(y)
    loss = angle(guess, y, dispersion=dispersion(y).item())
    assert loss.item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("loss", [*SPATIAL_LOSSES.values(), summary_loss, angle])
def test_the_losses_of_single_images_average_to_the_loss_of_the_batch(loss):
    shape = (3, 4, 5, 6) if loss in SPATIAL_LOSSES.values() else (3, 6)
    theirs = torch.randn(shape)
    ours = torch.randn(shape, requires_grad=True)
    each = by_image(loss)(ours, theirs)
    assert each.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(each[i], loss(ours[i : i + 1], theirs[i : i + 1]))
    torch.testing.assert_close(each.mean(), loss(ours, theirs))
    slopes = [torch.autograd.grad(x, ours)[0] for x in (each.mean(), loss(ours, theirs))]
    torch.testing.assert_close(*slopes)
