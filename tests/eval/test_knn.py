"""kNN against scikit-learn and a planted answer."""

import pytest
import torch

import zoo.eval.knn
from zoo.eval.knn import knn, predict_knn


def clusters(rows, classes, dim, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


def top1(*sets, **how):
    ((name, value),) = knn(*sets, **how)
    assert name == "knn/top1"
    return value


@pytest.mark.parametrize(("noise", "k"), [(0.1, 20), (1.5, 20), (1.5, 1), (30.0, 7)])
def test_equals_scikit_learn_with_the_same_weights(noise, k):
    from sklearn.neighbors import KNeighborsClassifier

    bank, queries = clusters(300, 7, 12, noise, 0), clusters(203, 7, 12, noise, 1)
    ours = top1(*bank, *queries, k=k, temperature=0.1)
    theirs = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda d: torch.tensor(-d / 0.1).exp().numpy(),
    ).fit(bank[0].double().numpy(), bank[1].numpy())
    want = 100 * theirs.score(queries[0].double().numpy(), queries[1].numpy())
    assert ours == pytest.approx(want, abs=1e-9)


def test_one_close_neighbour_outvotes_two_far_ones_only_at_a_low_temperature():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query, truth = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    assert top1(bank, labels, query, truth, k=3, temperature=0.07) == 100
    assert top1(bank, labels, query, truth, k=3, temperature=10.0) == 0


def test_k_is_capped_at_the_bank_and_an_unseen_class_counts_as_wrong():
    bank, labels = torch.eye(3), torch.tensor([0, 0, 1])
    queries, truth = torch.eye(3), torch.tensor([0, 0, 5])
    assert top1(bank, labels, queries, truth, k=20) == pytest.approx(200 / 3)


def test_the_number_does_not_depend_on_how_the_queries_are_chunked(monkeypatch):
    bank, queries = clusters(60, 4, 8, 2.0, 0), clusters(50, 4, 8, 2.0, 1)
    whole = top1(*bank, *queries)
    monkeypatch.setattr(zoo.eval.knn, "SIMILARITIES_AT_ONCE", 60 * 7)
    assert top1(*bank, *queries) == whole
    assert 30 < whole < 100


def test_a_temperature_near_zero_is_the_nearest_neighbour():
    bank, queries = clusters(60, 4, 8, 2.0, 0), clusters(50, 4, 8, 2.0, 1)
    assert top1(*bank, *queries, temperature=1e-4) == top1(*bank, *queries, k=1)


def test_unusable_sets_are_refused_with_their_numbers():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="bank set is empty"):
        top1(x[:0], y[:0], x, y)
    with pytest.raises(ValueError, match=r"query features have the shape \(3, 3\)"):
        top1(x, y, x, y[:2])
    with pytest.raises(ValueError, match="3 channels and the queries have 2"):
        top1(x, y, x[:, :2], y)
    with pytest.raises(ValueError, match="1 of 3 query features hold NaN"):
        top1(x, y, x / torch.tensor([[1.0], [1.0], [0.0]]), y)
    with pytest.raises(ValueError, match="labels count from 0"):
        top1(x, y - 1, x, y)
    with pytest.raises(ValueError, match="must be positive"):
        top1(x, y, x, y, k=0)


@pytest.mark.parametrize("part", [7, 20, 64, 65])
def test_the_answers_do_not_depend_on_how_the_bank_is_walked(monkeypatch, part):
    bank, queries = clusters(130, 5, 8, 2.0, 0), clusters(50, 5, 8, 2.0, 1)
    whole = predict_knn(*bank, *queries)
    monkeypatch.setattr(zoo.eval.knn, "BANK_ROWS_AT_ONCE", part)
    assert torch.equal(predict_knn(*bank, *queries), whole)


def test_a_bank_in_half_precision_answers_like_its_float32_copy():
    (x, y), (u, v) = clusters(130, 5, 8, 0.5, 0), clusters(50, 5, 8, 0.5, 1)
    x, u = x.half(), u.half()
    assert torch.equal(predict_knn(x, y, u, v), predict_knn(x.float(), y, u.float(), v))


@pytest.mark.gpu
def test_a_bank_on_the_host_is_brought_to_the_gpu_part_by_part():
    bank, queries = clusters(300, 5, 8, 0.3, 0), clusters(50, 5, 8, 0.3, 1)
    predicted = predict_knn(*bank, *queries, device="cuda")
    assert predicted.is_cuda
    assert torch.equal(predicted.cpu(), predict_knn(*bank, *queries))
