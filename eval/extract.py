"""Run a model over labelled images once; several benchmarks then use the matrix of summaries."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zoo.features import Batch, Features
from zoo.train.mesh import gathered_on_first


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
    return _joined(_parts(model, batches))


def extract_share(model: Callable[[Batch], Features], batches: Iterable[Batch]) -> Extracted | None:
    """Do the same on several ranks, each with its share of the batches; every rank calls this.

    Rank 0 gets the summaries of all, in the order of the batches' numbers, and the others `None`.
    As each batch is the one that a single process would have, so are its summaries.

    Raises:
        ValueError: as `extract`, for the batches of all ranks.
    """
    parts = gathered_on_first(list(_parts(model, batches)))
    if parts is None:
        return None
    return _joined(sorted(parts, key=lambda part: part.number))


class _Part(NamedTuple):
    """What is kept of a batch."""

    number: int
    summaries: Float[Tensor, "B D"]
    labels: Int[Tensor, " B"] | None
    keys: Sequence[str]


def _parts(model: Callable[[Batch], Features], batches: Iterable[Batch]) -> Iterator[_Part]:
    for batch in batches:
        with torch.inference_mode():
            summaries = _summary(model(batch)).float().cpu()
        labels = None if batch.labels is None else batch.labels.cpu()
        yield _Part(batch.number, summaries, labels, batch.keys)


def _joined(parts: Iterable[_Part]) -> Extracted:
    parts = list(parts)
    if not parts:
        raise ValueError("There are no images to extract features from: there was no batch.")
    labels = [part.labels for part in parts if part.labels is not None]
    if labels and len(labels) != len(parts):
        raise ValueError(
            f"{len(labels)} of {len(parts)} batches have labels; give them with all batches or "
            "with none."
        )
    # Concatenated outside inference mode, so that a probe can differentiate through the result.
    summaries = torch.cat([part.summaries for part in parts])
    keys = [key for part in parts for key in part.keys]
    return Extracted(summaries, torch.cat(labels) if labels else None, keys)


def _summary(features: Features) -> Float[Tensor, "B D"]:
    if features.summary is not None:
        return features.summary
    if features.spatial is None:
        raise ValueError("The model returned neither a summary nor a spatial map; one is needed.")
    return features.spatial.float().mean(dim=(1, 2))
