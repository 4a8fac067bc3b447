"""Paired bootstrap intervals, against scipy's and against known differences."""

import numpy as np
import pytest

from zoo.eval.paired import compare, pair, paired_bootstrap
from zoo.eval.registry import Scores
from zoo.eval.results import Record


def answers(n, share, seed):
    return (np.random.default_rng(seed).random(n) < share).astype(np.uint8)


KEYS = [f"{i}.png" for i in range(400)]


def test_intervals_of_accuracies_are_those_of_scipy():
    from scipy.stats import bootstrap

    a, b = answers(400, 0.7, 0), answers(400, 0.76, 1)
    low, high = paired_bootstrap(Scores(KEYS, a), Scores(KEYS, b))

    def difference(x, y, axis):
        return 100 * (y.mean(axis=axis) - x.mean(axis=axis))

    theirs = bootstrap(
        (a.astype(float), b.astype(float)),
        difference,
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.55)
    assert high == pytest.approx(theirs.high, abs=0.55)
    assert low < 100 * (b.mean() - a.mean()) < high


def test_intervals_of_mean_iou_resample_images_before_the_ratio():
    from scipy.stats import bootstrap

    chance = np.random.default_rng(0)
    unions = chance.integers(50, 100, (60, 3)).astype(float)
    a, b = (unions * chance.uniform(low, 1, (60, 3)) for low in (0.2, 0.3))
    keys = KEYS[:60]
    low, high = paired_bootstrap(Scores(keys, a, unions), Scores(keys, b, unions))
    place = np.arange(60)

    def difference(rows):
        u = unions[rows].sum(axis=0)
        return 100 * ((b[rows].sum(axis=0) - a[rows].sum(axis=0)) / u).mean()

    theirs = bootstrap(
        (place,),
        difference,
        vectorized=False,
        method="percentile",
        n_resamples=3000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert (low, high) == (pytest.approx(theirs.low, abs=0.4), pytest.approx(theirs.high, abs=0.4))


def test_one_model_against_itself_differs_by_nothing_whatever_the_order_of_images():
    a = answers(400, 0.5, 0)
    order = np.random.default_rng(1).permutation(400)
    again = Scores([KEYS[i] for i in order], a[order])
    assert paired_bootstrap(Scores(KEYS, a), again) == (0, 0)


def test_other_images_are_refused_with_how_many_are_shared():
    a = answers(400, 0.5, 0)
    with pytest.raises(ValueError, match="400 and 399 images, of which 399"):
        paired_bootstrap(Scores(KEYS, a), Scores(KEYS[1:], a[1:]))


def record(share, seed, **changes):
    scores = Scores(KEYS, answers(400, share, seed))
    values = {"knn/top1": scores.value, "knn/other": 3.0}
    fields = dict(target="a", benchmark="knn", values=values, data_hash="x", settings={"k": 20})
    return Record(**fields | changes, kept={"knn/top1": scores})


def test_a_large_difference_is_separated_and_a_number_without_scores_has_no_interval():
    big, plain = compare([record(0.3, 0)], [record(0.8, 1)])
    assert big.separated and big.low > 30 and big.images == 400
    assert not plain.separated and plain.low is None and plain.describe()[-1] == "–"
    (named, _) = compare(*([record(0.3, 0, data="sets/birds")] for _ in range(2)))
    assert named.describe()[0] == "knn/top1 · birds"


@pytest.mark.parametrize("change", [dict(data_hash="y"), dict(settings={"k": 5})])
def test_results_of_other_data_or_settings_are_not_compared(change):
    with pytest.raises(ValueError, match="share no benchmark"):
        compare([record(0.3, 0)], [record(0.8, 1, **change)])


def measured(value, size=224, seed=0, benchmark="knn", precision="float32"):
    return Record(
        target="t",
        benchmark=benchmark,
        values={f"{benchmark}/top1": value},
        model=dict(name="m", size=size),
        seed=seed,
        precision=precision,
        data="birds",
        data_hash="d",
    )


def test_sizes_seeds_and_precisions_are_compared_each_with_its_own():
    first = [measured(10.0, 96), measured(20.0, 224), measured(30.0, 224, seed=1)]
    second = [measured(25.0, 224), measured(12.0, 96), measured(36.0, 224, seed=1)]
    rows = compare(first, second)
    assert [(row.first, row.second) for row in rows] == [(10, 12), (20, 25), (30, 36)]
    assert [row.how.split(",")[0] for row in rows] == ["96 px", "224 px", "224 px"]


def test_models_of_other_sizes_are_compared_and_the_sizes_named():
    (row,) = compare([measured(10.0, 96)], [measured(20.0, 224, precision="amp")])
    assert row.how == "96 px against 224 px, float32 against amp"
    assert "96 px against 224 px" in row.describe()[0]


def test_rows_of_other_settings_and_of_data_of_one_name_can_be_told_apart():
    def side(target, shift):
        common = dict(target=target, data="a/birds")
        return [
            record(0.3 + shift, 0, settings={"k": 5}, **common),
            record(0.4 + shift, 1, settings={"k": 20}, **common),
            record(
                0.5 + shift, 2, settings={"k": 20}, target=target, data="b/birds", data_hash="y"
            ),
        ]

    rows = [r for r in compare(side("a", 0), side("b", 0.2)) if r.measure == "knn/top1"]
    assert [row.describe()[0] for row in rows] == [
        "knn/top1 · birds (x) · k=5",
        "knn/top1 · birds (x) · k=20",
        "knn/top1 · birds (y)",
    ]


def test_two_weights_of_one_name_are_not_compared_in_silence():
    first = [record(0.3, 0, weights_hash="one"), record(0.9, 1, weights_hash="two")]
    with pytest.raises(ValueError, match="two models, one and two"):
        compare(first, [record(0.8, 1)])
    with pytest.raises(ValueError, match="two models, one and two"):
        compare([record(0.8, 1)], first)


def test_speeds_are_compared_on_one_machine_and_otherwise_say_both():
    def speed(value, gpu, batch=64):
        values = {"speed/img_s": value}
        return Record(
            target="t", benchmark="speed", values=values, machine={"gpu": gpu}, batch=batch
        )

    rows = compare([speed(1.0, "A"), speed(2.0, "B")], [speed(4.0, "B"), speed(3.0, "A")])
    assert [(row.first, row.second) for row in rows] == [(1, 3), (2, 4)]
    (row,) = compare([speed(1.0, "A")], [speed(4.0, "B", 32)])
    assert row.how == "batch 64 against batch 32, A against B"


def test_what_one_side_lacks_is_said():
    first = [measured(1.0), measured(2.0, benchmark="linear"), measured(3.0, 96)]
    pairing = pair(first, [measured(5.0), measured(5.0, benchmark="fewshot")])
    assert len(pairing.pairs) == 1
    told = pairing.left_out("a", "b")
    assert len(told) == 3
    assert told[0].startswith("only a has linear on birds") and "224 px" in told[0]
    assert told[1].startswith("only a has knn on birds: 96 px")
    assert told[2].startswith("only b has fewshot")
