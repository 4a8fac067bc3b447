"""Few-shot classification: a linear classifier fitted to a few labelled images of each class."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from zoo.eval.knn import used as of_labelled
from zoo.eval.linear import predict_linear
from zoo.eval.registry import Found, Scores, Subject
from zoo.eval.settings import FewshotSettings


def fewshot(subject: Subject, data: Path, settings: FewshotSettings) -> Iterator[Found]:
    """Fit a linear classifier to n images of each class, several times; yield mean and interval.

    `fewshot/n/top1` is the mean accuracy over the draws in per cent, `fewshot/n/low` and `/high`
    the 95 % interval of that mean by Student's t over the draws (the queries stay the same).

    Raises:
        ValueError: the smallest class has fewer images than every number of shots, or a number is
            below 1.
    """
    bank, queries = subject.extracted(data)
    assert bank.labels is not None and queries.labels is not None
    settings = used(subject, (), settings)
    fewest = int(_per_class(bank.labels).min())
    shots = [n for n in settings.shots if n <= fewest]
    if not shots:
        raise ValueError(
            f"The smallest class has {fewest} images, fewer than any of --fewshot.shots "
            f"{settings.shots}."
        )
    summaries = bank.summaries.to(subject.device)
    labels, query_summaries = bank.labels.to(subject.device), queries.summaries.to(subject.device)
    for n in shots:
        right = []
        for draw in range(settings.draws):
            rows = drawn(bank.labels, n, seed=subject.seed * 1000 + draw).to(subject.device)
            predicted = predict_linear(
                summaries[rows],
                labels[rows],
                query_summaries,
                queries.labels,
                strengths=(settings.strength,),
            )
            right.append((predicted.cpu() == queries.labels.cpu()).numpy())
        yield f"fewshot/{n}/top1", Scores(queries.keys, np.mean(right, axis=0))
        low, high = interval([100 * float(one.mean()) for one in right])
        if settings.draws > 1:
            yield f"fewshot/{n}/low", low
            yield f"fewshot/{n}/high", high


def used(subject: Subject, data: Sequence[Path], settings: FewshotSettings) -> FewshotSettings:
    """Return the settings as they are.

    Raises:
        ValueError: a number is below 1; a folder has no images, or they have no classes.
    """
    if settings.draws < 1 or not settings.shots or min(settings.shots) < 1:
        raise ValueError(
            f"Few-shot with shots {settings.shots} and {settings.draws} draws; all must be "
            "at least 1."
        )
    return of_labelled(subject, data, settings)


def _per_class(labels: Int[Tensor, " n"]) -> Int[Tensor, " classes"]:
    counts = torch.bincount(labels)
    return counts[counts > 0]


def drawn(labels: Int[Tensor, " n"], shots: int, *, seed: int) -> Int[Tensor, " k"]:
    """Draw `shots` indices of each class, without replacement."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draws)
    classes = labels.cpu()[order]
    sort = classes.sort(stable=True)
    first = torch.searchsorted(sort.values, sort.values)  # where the class of each row begins
    rank = torch.arange(len(labels)) - first
    return order[sort.indices[rank < shots]]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t; with one value it is infinite.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("There is no value to compute an interval of.")
    if len(values) == 1:
        return -math.inf, math.inf
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = _quantile(len(values) - 1) * error
    return mean - half, mean + half


@cache
def _quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))
