import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zoo.data.feed import PlanFeed
from zoo.data.loader import PlanSampler, train_batches
from zoo.data.plan import Plan, mix, shuffled
from zoo.data.views import View


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000), st.integers(0, 2**62))
def test_an_epoch_shows_every_sample_once(total, key):
    assert sorted(shuffled(np.arange(total), total, key)) == list(range(total))


SHARES = st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 5), st.integers(0, 4)).flatmap(
    lambda drawn: st.fixed_dictionaries(
        dict(
            num_slices=st.just(drawn[0]),
            batch=st.just(drawn[0] * drawn[1]),
            # ranks from one stop to the next, each a number that shares the slices out
            worlds=st.lists(
                st.sampled_from([w for w in range(1, 7) if drawn[0] % w == 0]),
                min_size=drawn[2] + 1,
                max_size=drawn[2] + 1,
            ),
        )
    )
)


@settings(deadline=None, max_examples=60)
@given(SHARES, st.integers(1, 120), st.integers(0, 99), st.data())
def test_all_ranks_and_workers_together_see_each_epoch_once_whatever_stops_between(
    shares, samples, seed, data
):
    batch, num_slices, worlds = shares["batch"], shares["num_slices"], shares["worlds"]
    plan = Plan(samples, batch, seed)
    epochs = 2
    steps = -(-epochs * samples // batch)
    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=len(worlds) - 1,
                                      max_size=len(worlds) - 1)))  # fmt: skip
    seen: list[tuple[int, int]] = []
    for world, start, end in zip(worlds, [0, *stops], [*stops, steps], strict=True):
        share = num_slices // world
        for rank in range(world):
            slices = range(rank * share, (rank + 1) * share)
            seen += [s for part in PlanSampler(plan, start, end, num_slices, slices) for s in part]
    seen.sort()
    assert [position for position, _ in seen] == list(range(steps * batch))
    for epoch in range(epochs):
        indices = [index for _, index in seen[epoch * samples : (epoch + 1) * samples]]
        assert sorted(indices) == list(range(samples))


class Numbers:
    """A source whose image is its index."""

    def __len__(self):
        return 24

    def key(self, index):
        return str(index)

    def label(self, index):
        return None

    def read(self, index):
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 2, 3), index, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_two_ranks_load_what_the_plan_says_and_one_rank_goes_on(workers):
    plan, source, view = Plan(24, 8, 3), Numbers(), View(size=2)

    def pixels(slices, start, steps):
        parts = train_batches(
            source, view, plan, start=start, steps=steps, workers=workers, num_slices=2,
            slices=slices,
        )  # fmt: skip
        return [(p, int(i[0, 0, 0])) for b in parts
                for p, i in zip(b["positions"], b["images"], strict=True)]  # fmt: skip

    seen = pixels([0], 0, 2) + pixels([1], 0, 2) + pixels([0, 1], 2, 3)
    assert sorted(seen) == list(enumerate(plan.indices_at(np.arange(24)).tolist()))


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
