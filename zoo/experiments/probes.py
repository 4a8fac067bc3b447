"""kNN and linear probe on every labelled data set of a collection."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.eval.extract import extract
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe
from zoo.experiments.pictures import Collection
from zoo.features import Batch, Features

PROBE: dict[str, Any] = dict(strengths=(1e-2, 1e-3, 1e-4), max_steps=100)
FEW = 4000
"""Most rows for which L-BFGS on the CPU is faster than launching its kernels on a GPU."""


def probe(
    features: Callable[[Batch], Features],
    collection: Collection,
    size: int,
    *,
    linear: bool = True,
    fit: Mapping[str, Any] = PROBE,
) -> dict[str, float]:
    """Return `knn/top1/<data set>` and `linear/top1/<data set>` of a model's summaries, in %.

    A model without a summary is probed by the mean of its map.

    Args:
        size: Side of the images in pixels.
        linear: Fit the linear probe as well.
        fit: Keywords of `linear_probe`.
    """
    values = {}
    for name, pair in collection.probes.items():
        bank, queries = (extract(features, part.batches(size, 512)) for part in pair)
        assert bank.labels is not None and queries.labels is not None
        device = pair[0].images.device if len(bank.labels) > FEW else torch.device("cpu")
        known = bank.summaries.to(device), bank.labels.to(device)
        tested = queries.summaries.to(device), queries.labels.to(device)
        accuracies = dict(knn(*known, *tested))
        if linear:
            accuracies |= dict(linear_probe(*known, *tested, **fit))
        values |= {f"{metric}/{name}": value for metric, value in accuracies.items()}
    return values
