"""The table of benchmarks, and the numbers that scores of single images make."""

import numpy as np
import pytest
import torch

from zoo.eval.benchmarks import BENCHMARKS, Benchmark, find, load, settings_of
from zoo.eval.extract import Extracted
from zoo.eval.registry import Scores, Subject


def test_an_unknown_benchmark_is_refused_with_the_nearest_name():
    assert find(["knn", "linear", "knn"]) == ["knn", "linear"]
    with pytest.raises(ValueError, match=r"no benchmark 'fewshoot'.*Did you mean fewshot\?"):
        find(["knn", "fewshoot"])


@pytest.mark.parametrize("name", sorted(BENCHMARKS.keys() - {"detect", "lmeval"}))
def test_a_line_of_the_table_leads_to_a_function_and_the_class_of_its_settings(name):
    run, settings = load(name)
    assert callable(run) and settings is settings_of(name)
    assert settings() == settings()  # a dataclass, and every field has a default


def test_a_benchmark_whose_package_is_missing_says_which(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "moon", Benchmark("zoo.eval.not_there:moon", "moon", "moon/x"))
    with pytest.raises(ValueError, match=r"moon needs zoo\.eval\.not_there"):
        load("moon")


def test_scores_make_the_mean_of_ratios_of_sums_over_columns_that_have_any():
    assert Scores(["a", "b", "c"], np.array([1, 0, 1])).value == pytest.approx(200 / 3)
    hits = np.array([[1, 0, 0], [2, 1, 0]])
    unions = np.array([[2, 1, 0], [4, 3, 0]])
    assert Scores(["a", "b"], hits, unions).value == pytest.approx(100 * (3 / 6 + 1 / 4) / 2)
    assert np.isnan(Scores(["a"], np.array([[0]]), np.array([[0]])).value)


def test_a_subject_of_stored_features_is_opened_once_and_has_no_network(tmp_path):
    opened = []

    def read(data):
        opened.append(data)
        side = Extracted(torch.eye(2), torch.tensor([0, 1]), ["a", "b"])
        return side, side

    subject = Subject(name="stored", made=None, read=read)
    assert subject.extracted(tmp_path) is subject.extracted(tmp_path)
    assert opened == [tmp_path]
    with pytest.raises(ValueError, match="known by its features alone"):
        _ = subject.student
