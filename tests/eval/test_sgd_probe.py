"""The linear probe by SGD, against scikit-learn's logistic regression and a planted answer."""

import pytest
import torch

from zoo.eval.linear import predict_sgd


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def accuracy(predicted, truth):
    return 100 * float((predicted == truth).double().mean())


def test_comes_within_a_point_of_scikit_learn_without_a_penalty_on_digits():
    from sklearn.linear_model import LogisticRegression

    bank, queries = digits()
    std, mean = torch.std_mean(bank[0], dim=0, correction=0)
    std = torch.where(std > 0, std, 1)
    a, b = (((x - mean) / std).numpy() for x in (bank[0], queries[0]))
    want = 100 * LogisticRegression(C=1e3, max_iter=2000).fit(a, bank[1]).score(b, queries[1])
    predicted = predict_sgd(*bank, *queries, rates=(1e-2, 1e-1), least_steps=500, batch=256)
    assert abs(accuracy(predicted, queries[1]) - want) <= 1


def test_the_seed_decides_the_order_and_a_rate_that_is_too_small_is_not_chosen():
    bank, queries = digits()
    bank = bank[0][:300], bank[1][:300]
    how = dict(epochs=5, least_steps=0, batch=64)
    predicted = predict_sgd(*bank, *queries, rates=(1e-1, 1e-6), **how)
    assert torch.equal(predicted, predict_sgd(*bank, *queries, rates=(1e-1, 1e-6), **how))
    assert torch.equal(predicted, predict_sgd(*bank, *queries, rates=(1e-1,), **how))
    assert accuracy(predicted, queries[1]) > 75


def test_settings_that_cannot_train_are_refused():
    bank, queries = digits()
    with pytest.raises(ValueError, match="all must be positive"):
        predict_sgd(*bank, *queries, rates=())
    with pytest.raises(ValueError, match="0 epochs"):
        predict_sgd(*bank, *queries, epochs=0)
