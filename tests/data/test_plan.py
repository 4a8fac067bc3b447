import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.feed import PlanFeed
from zoo.data.loader import PlanSampler
from zoo.data.plan import Plan, mix, shuffled


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000), st.integers(0, 2**62))
def test_an_epoch_shows_every_sample_once(total, key):
    assert sorted(shuffled(np.arange(total), total, key)) == list(range(total))


def test_epochs_and_seeds_have_their_own_orders():
    plan, other = Plan(500, 500, 0), Plan(500, 500, 1)
    orders = [tuple(p.indices(e)) for p in (plan, other) for e in (0, 1)]
    assert len(set(orders)) == 4


def test_neighbouring_positions_are_not_neighbouring_samples():
    order = shuffled(np.arange(10_000), 10_000, 7)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_two_half_batches_are_one_batch():
    whole, half = Plan(37, 8, 3), Plan(37, 4, 3)
    for step in range(12):
        halves = [half.indices(2 * step), half.indices(2 * step + 1)]
        assert np.concatenate(halves).tolist() == whole.indices(step).tolist()


def test_the_order_is_what_it_always_was():
    """Another order would make every run that was started before impossible to resume."""
    assert Plan(10, 10, 0).indices(0).tolist() == [0, 2, 6, 5, 9, 3, 1, 7, 8, 4]
    assert mix(1, 2, 3) == 3_851_293_329_796_251_419


def test_draws_depend_on_seed_and_position_only():
    plan = Plan(10, 4, 5)
    assert plan.draws(7).random() == Plan(99, 3, 5).draws(7).random()
    assert plan.draws(7).random() != plan.draws(8).random()
    assert plan.draws(7).random() != Plan(10, 4, 6).draws(7).random()


def test_a_plan_without_samples_is_refused():
    with pytest.raises(ValueError, match="0 samples"):
        Plan(0, 4, 0)


def test_stored_views_repeat_with_their_random_numbers():
    plan, endless = Plan(10, 4, 5, views=2), Plan(10, 4, 5)
    first = np.concatenate([plan.indices(step) for step in range(5)])
    again = np.concatenate([plan.indices(step) for step in range(5, 10)])
    assert first.tolist() == again.tolist()
    assert plan.draws(3).random() == plan.draws(23).random() == endless.draws(3).random()
    assert first.tolist() == [i for step in range(5) for i in endless.indices(step)]
    assert plan.indices_at(np.array([23, 7])).tolist() == first[[3, 7]].tolist()


def test_an_array_is_hashed_number_by_number():
    numbers = np.arange(-3, 40, 7)
    assert mix(5, numbers, 2).tolist() == [mix(5, int(n), 2) for n in numbers]


def test_a_step_takes_as_many_images_as_its_kind_has_and_none_twice():
    plan, full = Plan(1000, 8, 5, batches=(8, 2)), Plan(1000, 8, 5)
    taken = [plan.positions(step).tolist() for step in range(60)]
    for step, positions in enumerate(taken):
        assert positions == full.positions(step).tolist()[: (8, 2)[plan.kind(step, 2)]]
        assert plan.count(step) == len(positions) == len(plan.indices(step))
    assert 20 < sum(len(positions) == 2 for positions in taken) < 40


@pytest.mark.parametrize("num_slices", [1, 2])
def test_slices_share_out_what_a_step_takes_and_losses_are_divided_by_it(num_slices):
    plan = Plan(1000, 8, 5, batches=(8, 2))
    sampler = PlanSampler(plan, 3, 9, num_slices, range(num_slices))
    parts = list(sampler)
    assert len(parts) == len(sampler) == 6 * num_slices
    feed = PlanFeed()
    feed.plan = plan
    for step in range(3, 9):
        here = parts[(step - 3) * num_slices :][:num_slices]
        assert len({len(part) for part in here}) == 1
        assert [position for part in here for position, _ in part] == plan.positions(step).tolist()
        assert feed.counts(step)["any"] == sum(map(len, here))
