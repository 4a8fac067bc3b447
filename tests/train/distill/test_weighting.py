from dataclasses import replace

import pytest
import torch

from zoo.students.student import MESA
from zoo.train.distill.config import Losses, TeacherSpec
from zoo.train.distill.weighting import Weighting, drop_coefficients

NAMES = ("a/summary", "a/spatial", "b/spatial")
SPECS = {
    "a": TeacherSpec(name="rule:a", summary=0.5),
    "b": TeacherSpec(name="rule:b", spatial=2.0, rate=0.25),
}
BASELINE_LOSSES = {"a/summary": 0.5, "a/spatial": 1.0, "b/spatial": 4.0}
LOSSES = torch.tensor([1.0, 2.0, 3.0])


def weighting(names=NAMES, **settings) -> Weighting:
    return Weighting(names, SPECS, Losses(**settings), BASELINE_LOSSES)


def test_static_weights_are_those_of_the_teachers():
    assert weighting()(LOSSES).item() == 0.5 * 1 + 2 + 2 * 3


def test_dispersion_weights_divide_each_loss_by_what_a_constant_guess_would_lose():
    assert weighting(weighting="dispersion")(LOSSES).item() == 0.5 * 1 / 0.5 + 2 + 2 * 3 / 4
    # the angle loss is over the dispersion already
    both = weighting(weighting="dispersion", summary="angle")
    assert both(LOSSES).item() == 0.5 * 1 + 2 + 2 * 3 / 4


def test_a_learned_variance_settles_where_it_equals_the_loss():
    """The minimum of L exp(-s)/2 + s/2 over s is at s = log L (Kendall et al., 3.2)."""
    learned = weighting(weighting="uncertainty")
    assert learned(LOSSES).item() == 0.5 * (0.5 * 1 + 2 + 2 * 3)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        learned(LOSSES).backward()
        optimizer.step()
    torch.testing.assert_close(learned.learned.exp(), LOSSES)
    assert set(learned.state_dict()) == {"learned"}


@pytest.mark.parametrize("kind", ["static", "adaloss", "uncertainty", "dispersion"])
def test_the_average_of_the_student_itself_keeps_its_own_weight(kind):
    names = (*NAMES, f"{MESA}/spatial")
    both = [
        Weighting(
            names, SPECS, Losses(weighting=kind, mesa=mesa, teacher_drop=drop), BASELINE_LOSSES
        )(x)
        for mesa, drop, x in [
            (3.0, 0.0, torch.tensor([1.0, 2, 3, 7])),
            (3.0, 0.0, torch.tensor([1.0, 2, 3, 0])),
            (3.0, 1.0, torch.tensor([[1.0], [2], [3], [7]])),
            (3.0, 1.0, torch.tensor([[1.0], [2], [3], [0]])),
        ]
    ]
    assert (both[0] - both[1]).item() == pytest.approx(21)
    assert (both[2] - both[3]).item() == pytest.approx(21)


@pytest.mark.parametrize("images", [None, 4])
def test_a_sampled_teacher_counts_as_often_as_its_rate_and_as_much_more(images):
    some = weighting()
    losses = LOSSES if images is None else LOSSES[:, None].expand(3, images) / images
    asked, alone = some(losses, frozenset("ab")), some(losses, frozenset("a"))
    assert 0.25 * asked + 0.75 * alone == some(losses)


def test_adaloss_weighs_by_the_steps_before_and_waits_with_a_teacher_that_was_not_sampled():
    some = weighting(weighting="adaloss")
    assert some(LOSSES).item() == 0.5 * 1 + 2 + 2 * 3  # none so far: as static
    some.observe(torch.tensor([1.0, 2.0, torch.nan]))
    assert some.running[:2].tolist() == [1, 2] and some.running[2].isnan()
    assert some(torch.tensor([1.0, 2, 0]), frozenset("a")).item() == pytest.approx(0.5 + 1)
    some.observe(LOSSES)
    some.observe(torch.tensor([1.0, 2.0, torch.nan]))
    assert some.running.tolist() == [1, 2, 3]
    assert some(LOSSES).item() == pytest.approx(0.5 + 1 + 2)
    assert set(some.state_dict()) == {"running"}


@pytest.mark.parametrize("kind", ["static", "adaloss", "uncertainty", "dispersion"])
def test_the_slices_of_a_step_add_up_to_the_whole(kind):
    whole = Weighting(NAMES, SPECS, Losses(weighting=kind), BASELINE_LOSSES)
    half = Weighting(NAMES, SPECS, Losses(weighting=kind), BASELINE_LOSSES, num_slices=2)
    for some in (whole, half):
        some.observe(2 * LOSSES)
    parts = half(0.25 * LOSSES) + half(0.75 * LOSSES)
    torch.testing.assert_close(parts, whole(LOSSES))


def test_teacher_drop_divides_by_the_number_of_kept_pairs_of_the_batch():
    """By hand: three teachers, three images, and five of nine pairs that stay."""
    losses = torch.tensor([[5.0, 1.0, 2.0], [3.0, 4.0, 1.0], [1.0, 2.0, 6.0]])
    #   worst: teacher 0 of image 0, 1 of image 1, 2 of image 2; drawn: 1 of image 0, 0 of image 2
    draws = torch.tensor([[0.1, 0.2, 0.5], [0.9, 0.0, 0.3], [0.4, 0.1, 0.2]])
    kept = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 0, 1]])
    found = drop_coefficients(losses, draws, 0.5)
    torch.testing.assert_close(found, kept * 9 / 5)
    # the mean of what stays, 20 / 5, times three teachers; a batch's loss is a mean over 3 images
    assert (found * losses).sum().item() / 3 == pytest.approx(3 * 20 / 5)


@pytest.mark.parametrize("chance", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("teachers", [2, 4])
def test_the_worst_teacher_counts_as_often_as_the_others_are_asked(teachers, chance):
    """In UNIC the others stay with the chance 1 - p, the worst always, each as one of the batch."""
    seed = torch.Generator().manual_seed(0)
    losses, draws = (torch.rand(teachers, 20_000, generator=seed) for _ in range(2))
    found = drop_coefficients(losses, draws, chance)
    is_worst = losses == losses.amax(0)
    ratio = found[is_worst].mean() / found[~is_worst].mean()
    assert ratio.item() == pytest.approx(1 / (1 - chance), rel=0.03)
    assert found.mean().item() == pytest.approx(1)


def test_a_teacher_that_is_not_asked_is_neither_kept_nor_the_worst():
    losses = torch.tensor([[9.0], [1.0], [2.0]])
    asked = torch.tensor([False, True, True])
    found = drop_coefficients(losses, torch.zeros(3, 1), 0.5, asked)
    assert found.flatten().tolist() == [0, 0, 2]


def test_no_drop_is_the_plain_sum_and_full_drop_leaves_the_worst_teacher_alone():
    each = torch.rand(3, 6)
    plain = weighting()
    torch.testing.assert_close(plain(each), plain(each.sum(1)))
    alone = weighting(teacher_drop=1.0)
    by_teacher = torch.stack([0.5 * each[0] + each[1], 2 * each[2]])
    torch.testing.assert_close(alone(each), 2 * by_teacher.amax(0).sum())


def test_the_draws_of_teacher_drop_follow_the_seed_of_the_step():
    some, each = weighting(teacher_drop=0.5), torch.rand(3, 32)
    totals = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        totals.append(some(each).item())
    assert totals[0] == totals[1] != totals[2]


def test_a_rate_outside_of_its_range_is_refused():
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError, match="share above 0"):
            replace(SPECS["a"], rate=rate)
