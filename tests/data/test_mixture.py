"""Several sources in one stream: who is where, and each is gone through as if it were alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zoo.data.feed import plan_of
from zoo.data.loader import PlanSampler, train_batches
from zoo.data.mixture import MixedPlan, Mixture
from zoo.data.names import MOST_PLACES, Weighted
from zoo.data.plan import Plan
from zoo.data.sources import FolderSource, open_source
from zoo.data.views import View
from zoo.train.distill.config import Distill
from zoo.train.distill.setup import open_data

PARTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), min_size=1, max_size=4)
"""Length and share of each source."""


def plan_for(parts, batch, seed, **more):
    lengths, shares = zip(*parts, strict=True)
    return MixedPlan(sum(lengths), batch, seed, lengths=lengths, shares=shares, **more)


def by_source(parts, indices):
    """Split indices of the joined sources into those of each."""
    ends = np.cumsum([length for length, _ in parts])
    whose = np.searchsorted(ends, indices, side="right")
    return [indices[whose == n] - (ends[n] - parts[n][0]) for n in range(len(parts))]


@settings(deadline=None, max_examples=30)
@given(PARTS, st.integers(0, 99), st.integers(1, 300))
def test_each_source_is_gone_through_once_a_pass_whatever_the_others_are(parts, seed, count):
    plan = plan_for(parts, 1, seed)
    for (length, _), seen in zip(
        parts, by_source(parts, plan.indices_at(np.arange(count))), strict=True
    ):
        for begin in range(0, len(seen), length):
            one_pass = seen[begin : begin + length]
            assert len(set(one_pass.tolist())) == len(one_pass)
        whole = len(seen) // length * length
        assert Counter(seen[:whole].tolist()) == dict.fromkeys(range(length), whole // length) or (
            not whole
        )


@settings(deadline=None, max_examples=30)
@given(PARTS, st.integers(0, 99), st.integers(0, 50))
def test_every_block_of_the_stream_is_mixed_as_the_weights_say(parts, seed, block):
    shares = [share for _, share in parts]
    size = sum(shares)
    positions = np.arange(block * size, (block + 1) * size)
    found = by_source(parts, plan_for(parts, 1, seed).indices_at(positions))
    assert [len(part) for part in found] == shares


@settings(deadline=None, max_examples=30)
@given(
    parts=PARTS, seed=st.integers(0, 99), num_slices=st.sampled_from([1, 2, 4, 6]),
    each=st.integers(1, 4), steps=st.integers(1, 12), data=st.data(),
)  # fmt: skip
def test_ranks_slices_and_resumes_together_see_the_stream_of_one_process(
    parts, seed, num_slices, each, steps, data
):
    batch = num_slices * each
    plan = plan_for(parts, batch, seed)
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=3)))
    worlds = [w for w in range(1, 7) if num_slices % w == 0]
    seen: list[tuple[int, int]] = []
    for start, end in zip([0, *stops], [*stops, steps], strict=True):
        world = data.draw(st.sampled_from(worlds))
        share = num_slices // world
        for rank in range(world):
            slices = range(rank * share, (rank + 1) * share)
            seen += [s for part in PlanSampler(plan, start, end, num_slices, slices) for s in part]
    alone = plan_for(parts, 1, seed)
    assert sorted(seen) == [(p, int(alone.indices(p)[0])) for p in range(steps * batch)]


def test_no_place_of_a_batch_belongs_to_one_source_alone():
    """A pattern that repeats would give a rank of one image a step one source for ever."""
    parts = [(1000, 1), (1000, 1)]
    sources, _ = plan_for(parts, 2, 0).dealt(np.arange(400))
    first = sources[::2]
    assert 60 < first.sum() < 140


def test_the_order_is_what_it_always_was():
    """Another order would make every run that was started before impossible to resume."""
    plan = MixedPlan(9, 12, 0, lengths=(4, 5), shares=(2, 1))
    assert plan.indices(0).tolist() == [6, 3, 2, 0, 4, 1, 0, 2, 8, 1, 3, 5]


def test_a_source_alone_keeps_its_plan_and_stored_views_repeat():
    source = FolderSource(None, ("a.png", "b.png"))  # pyright: ignore
    assert plan_of(source, 4, 0) == Plan(2, 4, 0)
    plan = plan_for([(3, 2), (4, 1)], 4, 5, views=2)
    assert plan.indices_at(np.arange(14)).tolist() == plan.indices_at(np.arange(14, 28)).tolist()


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("a=0.7,b=0.3", (7, 3)),
        ("a=2,b=1,c=1", (2, 1, 1)),
        ("s3://x/a=.1,b=3.", (1, 30)),
        ("a", None),
        ("a,b", None),
        ("https://host/x?v=1", None),
    ],
)
def test_weights_are_read_as_the_smallest_whole_numbers(text, shares):
    found = Weighted.parse(text)
    assert (found and found.shares) == shares


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a=1,b", "'b' of a=1,b is no source with a weight above 0"),
        ("a=1,b=0", "'b=0' of"),
        ("a=1,=2", "'=2' of"),
        ("a=1,b=-1", "'b=-1' of"),
        ("a=1,b=1e9", "'b=1e9' of"),  # which nobody computes as a whole number
        ("a=0,b=0", "'a=0' of"),
        ("a=1,b=2,a=1", "names a twice"),
        (f"a=1,b={MOST_PLACES}", "1, 1000 are near"),
        ("a=0.33333,b=0.66667", "333, 667 are near"),
    ],
)
def test_weights_that_mean_nothing_are_refused_in_a_line(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        Weighted.parse(text)
    assert "\n" not in str(error.value)


def test_each_source_keeps_its_own_images_apart_and_a_run_knows_how_many_each_has(tmp_path):
    for name in ("a", "b"):
        for number in range(10):
            place = tmp_path / name / ("val" if number < 3 and name == "a" else "train")
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(place / f"{number}.png")
    given = dict(data=f"{tmp_path}/a=1,{tmp_path}/b/train=2", held_out=0.2)
    train, val, labelled = open_data(Distill(**given))
    assert isinstance(train, Mixture) and train.lengths == (7, 8) and labelled is None
    assert isinstance(val, Mixture) and val.lengths == (3, 2)
    keys = [source.key(i) for source in (train, val) for i in range(len(source))]
    assert len(set(keys)) == 20
    with pytest.raises(ValueError, match="embedded/phot"):
        open_data(Distill(data=f"{tmp_path}/a=1,embedded/phot=2"))
    with pytest.raises(ValueError, match="There is no data at"):
        open_data(Distill(data=f"{tmp_path}/a=1,{tmp_path}/c=2"))


def test_the_loader_shows_images_of_both_sources_by_their_names(tmp_path):
    for name, value in (("a", 0), ("b", 200)):
        (tmp_path / name).mkdir()
        for number in range(3):
            place = tmp_path / name / f"{number}.png"
            Image.fromarray(np.full((4, 4, 3), value + number, np.uint8)).save(place)
    weighted = Weighted.parse(f"{tmp_path}/a=2,{tmp_path}/b=1")
    source = Mixture(tuple(open_source(name) for name in weighted.names), weighted)
    plan = plan_of(source, 6, 0)
    for batch in train_batches(source, View(size=4), plan, steps=3):
        values = batch["images"][:, 0, 0, 0].tolist()
        assert sum(value >= 200 for value in values) == 2
        for key, value in zip(batch["keys"], values, strict=True):
            folder, number = ("a", value) if value < 200 else ("b", value - 200)
            assert key == f"{tmp_path}/{folder}/{number}.png"
