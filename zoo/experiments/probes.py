"""kNN and linear probe on every labelled data set of a collection."""

from collections.abc import Callable
from typing import Any

import torch

from zoo.eval.extract import extract
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe, predict_linear
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
    widen: bool = False,
) -> dict[str, float]:
    """Return `knn/top1/<data set>` and `linear/top1/<data set>` of a model's summaries, in %.

    A model without a summary is probed by the mean of its map.

    Args:
        size: Side of the images in pixels.
        linear: Fit the linear probe as well.
        widen: Fit it as `zoo eval` does: with all its strengths, further ones if the best is an
            end of those, and twice as many steps.
    """
    values = {}
    for name, pair in collection.probes.items():
        bank, queries = (extract(features, part.batches(size, 512)) for part in pair)
        assert bank.labels is not None and queries.labels is not None
        device = pair[0].images.device if len(bank.labels) > FEW else torch.device("cpu")
        known = bank.summaries.to(device), bank.labels.to(device)
        tested = queries.summaries.to(device), queries.labels.to(device)
        accuracies = dict(knn(*known, *tested))
        if linear and widen:
            hits = predict_linear(*known, *tested, widen=True) == tested[1]
            accuracies["linear/top1"] = 100 * hits.double().mean().item()
        elif linear:
            accuracies |= dict(linear_probe(*known, *tested, **PROBE))
        values |= {f"{metric}/{name}": value for metric, value in accuracies.items()}
    return values
