"""Run a model over labelled images once; every benchmark then works on the matrix."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.features import Batch, Features


class Extracted(NamedTuple):
    """One row an image, in the order of the batches."""

    summaries: Float[Tensor, "n D"]
    labels: Int[Tensor, " n"] | None
    """`None` when the batches carry none."""
    keys: list[str]


def extract(model: Callable[[Batch], Features], batches: Iterable[Batch]) -> Extracted:
    """Return the summaries of all images, float32 on the CPU, with their labels and keys.

    A model without a summary stands in with the mean of its spatial map. The model is run as it
    is: put it in eval mode first. For a progress bar wrap the batches: `rich.progress.track(...)`.

    Raises:
        ValueError: there are no batches, or only some of them carry labels.
    """
    summaries, labels, keys = [], [], []
    for batch in batches:
        with torch.inference_mode():
            summaries.append(_summary(model(batch)).float().cpu())
        if batch.labels is not None:
            labels.append(batch.labels.cpu())
        keys.extend(batch.keys)
    if not summaries:
        raise ValueError("There are no images to extract features from: no batch came.")
    if labels and len(labels) != len(summaries):
        raise ValueError(
            f"Labels came with {len(labels)} of {len(summaries)} batches; give them with all "
            "batches or with none."
        )
    # Joined outside inference mode: a probe may then differentiate through what it is given.
    return Extracted(torch.cat(summaries), torch.cat(labels) if labels else None, keys)


def _summary(features: Features) -> Float[Tensor, "B D"]:
    if features.summary is not None:
        return features.summary
    if features.spatial is None:
        raise ValueError("The model gave neither a summary nor a spatial map; one is needed.")
    return features.spatial.float().mean(dim=(1, 2))
