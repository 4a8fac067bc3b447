"""Latency from a few measurements: a sum of what each part of a model costs on a device."""

import itertools
from collections.abc import Callable, Sequence

import torch

Predict = Callable[[Sequence[float | int]], float]
"""Milliseconds, from features of a model."""


def fit_latency(rows: Sequence[Sequence[float | int]], times: Sequence[float]) -> Predict:
    """Fit times as a sum of features with factors that are not negative, by least squares.

    A small model's time is that of its layers' launches, a large one's that of its FLOPs or of the
    weights that it reads; which of them counts is left to the measurements. There are few features,
    so every subset is tried, and errors are relative.

    Args:
        rows: Features of each model that was timed.
        times: Their milliseconds.
    """
    x = torch.tensor(rows, dtype=torch.float64)
    y = torch.tensor(times, dtype=torch.float64)
    best, factors = float("inf"), torch.zeros(x.shape[1], dtype=torch.float64)
    for number in range(1, x.shape[1] + 1):
        for chosen in itertools.combinations(range(x.shape[1]), number):
            part = x[:, list(chosen)] / y[:, None]
            found = torch.linalg.lstsq(part, torch.ones_like(y)[:, None], driver="gelsd").solution[
                :, 0
            ]
            error = float((part @ found - 1).square().sum())
            if bool((found >= 0).all()) and error < best - 1e-12:
                best = error
                factors = torch.zeros_like(factors).index_copy(0, torch.tensor(chosen), found)
    weights = factors.tolist()
    return lambda row: sum(w * f for w, f in zip(weights, row, strict=True))
