"""Run a model over labelled images once; several benchmarks then use the matrix of summaries."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.features import Batch, Features


class Extracted(NamedTuple):
    """The summaries of images, one row for each, in the order of the batches."""

    summaries: Float[Tensor, "n D"]
    labels: Int[Tensor, " n"] | None
    """`None` if the batches have none."""
    keys: list[str]
    unreadable: tuple[str, ...] = ()
    """Names of the images that could not be read, where they are known here; they have no row."""


def extract(model: Callable[[Batch], Features], batches: Iterable[Batch]) -> Extracted:
    """Return the summaries of all images, float32 on the CPU, with their labels and keys.

    Where a model has no summary, the mean of its spatial map is used. Put the model in eval mode
    first. For a progress bar, wrap the batches in `rich.progress.track(...)`.

    Raises:
        ValueError: there are no batches, only some of them have labels, or the model returns
            neither a summary nor a map.
    """
    summaries, labels, keys = [], [], []
    for batch in batches:
        with torch.inference_mode():
            summaries.append(_summary(model(batch)).float().cpu())
        if batch.labels is not None:
            labels.append(batch.labels.cpu())
        keys.extend(batch.keys)
    if not summaries:
        raise ValueError("There are no images to extract features from: there was no batch.")
    if labels and len(labels) != len(summaries):
        raise ValueError(
            f"{len(labels)} of {len(summaries)} batches have labels; give them with all batches or "
            "with none."
        )
    # Concatenated outside inference mode, so that a probe can differentiate through the result.
    return Extracted(torch.cat(summaries), torch.cat(labels) if labels else None, keys)


def _summary(features: Features) -> Float[Tensor, "B D"]:
    if features.summary is not None:
        return features.summary
    if features.spatial is None:
        raise ValueError("The model returned neither a summary nor a spatial map; one is needed.")
    return features.spatial.float().mean(dim=(1, 2))
