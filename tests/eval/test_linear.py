"""The linear probe against scikit-learn's logistic regression."""

import pytest
import torch

import zoo.eval.linear
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe, predict_ridge


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def top1(*sets, **how):
    ((name, value),) = linear_probe(*sets, **how)
    assert name == "linear/top1"
    return value


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_equals_scikit_learn_to_half_a_point_on_digits(strength):
    from sklearn.linear_model import LogisticRegression

    bank, queries = digits()
    std, mean = torch.std_mean(bank[0], dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    a, b = (((x - mean) / std).numpy() for x in (bank[0], queries[0]))
    theirs = LogisticRegression(C=1 / (len(a) * strength), max_iter=1000).fit(a, bank[1].numpy())
    want = 100 * theirs.score(b, queries[1].numpy())
    assert 85 < want < 99
    assert abs(top1(*bank, *queries, strengths=(strength,)) - want) <= 0.5


def test_a_sweep_goes_on_where_its_best_is_an_end(caplog):
    """Noisy classes want a stronger penalty than the strongest of those that are given."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (240,), generator=g)
    x = 0.3 * torch.randn(4, 64, generator=g)[labels] + torch.randn(240, 64, generator=g)
    sets = x[:160], labels[:160], x[160:], labels[160:]
    few = (1e-4, 1e-5)
    zoo.eval.linear.predict_linear(*sets, strengths=few)
    assert "is an end of those that were tried" in caplog.text
    caplog.clear()
    wide = zoo.eval.linear.predict_linear(*sets, strengths=few, widen=True)
    assert "is an end" not in caplog.text
    narrow = zoo.eval.linear.predict_linear(*sets, strengths=few)
    right = [(p == sets[3]).float().mean().item() for p in (narrow, wide)]
    assert right[1] > right[0]


def test_a_fit_that_is_stopped_on_its_way_is_told(caplog):
    bank, queries = digits()
    zoo.eval.linear.predict_linear(*bank, *queries, strengths=(1e-5,), max_steps=3)
    assert "did not converge in 3 steps" in caplog.text
    caplog.clear()
    zoo.eval.linear.predict_linear(*bank, *queries, strengths=(1e-2,))
    assert not caplog.text


def test_the_chosen_strength_is_about_as_good_as_the_best_and_the_same_again():
    bank, queries = digits()
    strengths = (10.0, 1e-1, 1e-3)
    each = [top1(*bank, *queries, strengths=(s,)) for s in strengths]
    chosen = top1(*bank, *queries, strengths=strengths)
    assert chosen in each
    assert min(each) + 1 < max(each) - 1 <= chosen
    assert top1(*bank, *queries, strengths=strengths) == chosen


def test_scale_and_offset_of_the_features_do_not_matter_and_constant_channels_are_ignored():
    (x, y), (u, v) = digits()
    x, u, y, v = x[:300], u[:200], y[:300], v[:200]
    plain = top1(x, y, u, v, strengths=(1e-2,))
    gain = 10 ** torch.linspace(-3, 3, x.shape[1])
    moved = [torch.cat([a * gain + 5 * gain, torch.full((len(a), 1), 7.3)], 1) for a in (x, u)]
    assert abs(top1(moved[0], y, moved[1], v, strengths=(1e-2,)) - plain) <= 0.5


def test_the_number_does_not_depend_on_how_the_rows_are_chunked(monkeypatch):
    (x, y), (u, v) = digits()
    sets = x[:200], y[:200], u[:100], v[:100]
    whole = top1(*sets, strengths=(1e-1,))
    monkeypatch.setattr(zoo.eval.linear, "LOGITS_AT_ONCE", 10 * 33)
    assert abs(top1(*sets, strengths=(1e-1,)) - whole) <= 1


def test_it_fits_also_where_gradients_are_off():
    (x, y), (u, v) = digits()
    with torch.no_grad():
        assert top1(x[:200], y[:200], u[:100], v[:100], strengths=(1e-1,)) > 70


def test_a_bank_of_one_row_is_refused():
    with pytest.raises(ValueError, match="one row"):
        top1(torch.eye(3)[:1], torch.tensor([0]), torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="strengths"):
        top1(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), strengths=())


@pytest.mark.gpu
def test_on_a_gpu_both_classifiers_agree_with_the_cpu():
    bank, queries = digits()
    there = [x.cuda() for x in bank]
    assert abs(top1(*there, *queries) - top1(*bank, *queries)) <= 0.5
    ((_, here),), ((_, cuda),) = knn(*bank, *queries), knn(*there, *queries)
    assert abs(here - cuda) <= 0.5


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_the_closed_form_equals_scikit_learns_ridge_classifier(strength):
    from sklearn.linear_model import RidgeClassifier

    bank, queries = digits()
    std, mean = torch.std_mean(bank[0], dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    a, b = (((x - mean) / std).double().numpy() for x in (bank[0], queries[0]))
    scale = (a**2).sum() / len(a) / a.shape[1]  # the mean eigenvalue of XᵀX / n
    theirs = RidgeClassifier(alpha=len(a) * strength * scale).fit(a, bank[1].numpy())
    predicted = predict_ridge(*bank, *queries, strengths=(strength,))
    assert (predicted.numpy() == theirs.predict(b)).mean() > 0.995


def test_the_closed_form_chooses_its_strength_and_needs_no_more_rows_than_channels():
    (x, y), (u, v) = digits()
    few = x[:40], y[:40]
    accuracies = [
        float((predict_ridge(*few, u, v, strengths=strengths) == v).double().mean())
        for strengths in ((1e-5,), (1.0,), (1e-5, 1.0))
    ]
    assert accuracies[2] in accuracies[:2] and min(accuracies) > 0.5
