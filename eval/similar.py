"""Retrieval of images by an image: how high those of its class stand in the ranking."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.knn import SIMILARITIES_AT_ONCE, check_sets
from zoo.eval.registry import Found, Scores, Subject
from zoo.eval.settings import SimilarSettings


def similar(subject: Subject, data: Path, settings: SimilarSettings) -> Iterator[Found]:
    """Yield the mean average precision and the recall at 1 and 5, in per cent.

    Each validation image ranks the training images by the cosine of their summaries; those of its
    class are the right ones. Images whose class no training image has are left out.

    Raises:
        ValueError: the images have no classes, or features are not finite.
    """
    gallery, queries = subject.extracted(data)
    assert gallery.labels is not None and queries.labels is not None
    sets = gallery.summaries, gallery.labels, queries.summaries, queries.labels
    check_sets(*sets)
    precision, first = average_precisions(*sets, device=subject.device)
    known = np.flatnonzero(first > 0)
    keys = [queries.keys[i] for i in known]
    yield "similar/map", Scores(keys, precision[known])
    for rank in settings.ranks:
        yield f"similar/recall{rank}", Scores(keys, (first[known] <= rank).astype(float))


def average_precisions(
    gallery: Float[Tensor, "n D"],
    gallery_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    device: torch.device | str = "cpu",
) -> tuple[Float[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return each query's average precision, and the rank of its first right image (0 for none).

        AP = mean over the right images of (right ones up to its rank) / rank

    Ranks count from 1. Of equally similar images the wrong ones come first.
    """
    known = F.normalize(gallery.to(device).float(), dim=-1)
    labels = gallery_labels.to(device)
    rows = max(1, SIMILARITIES_AT_ONCE // (4 * len(known)))
    ranks = torch.arange(1, len(known) + 1, device=device)
    precisions, firsts = [], []
    for some, truth in zip(queries.split(rows), query_labels.split(rows), strict=True):
        cosine = F.normalize(some.to(device).float(), dim=-1) @ known.T
        right = truth.to(device)[:, None] == labels
        # wrong ones first, then a stable sort by similarity
        wrong_first = right.to(torch.uint8).argsort(dim=1, stable=True)
        order = cosine.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)
        hits = right.gather(1, wrong_first).gather(1, order)
        precision = (hits.cumsum(1) / ranks * hits).double().sum(1) / hits.sum(1).clamp(min=1)
        found = hits.any(dim=1)
        first = torch.where(found, hits.to(torch.uint8).argmax(dim=1) + 1, 0)
        precisions.append(precision.cpu())
        firsts.append(first.cpu())
    return torch.cat(precisions).numpy(), torch.cat(firsts).numpy()
