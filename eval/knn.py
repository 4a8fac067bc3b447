"""Weighted k-nearest neighbours: what the features know before anything is fitted to them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SIMILARITIES_AT_ONCE = 2**26
"""Entries of the queries x bank matrix that are held at a time (256 MiB in float32)."""


def knn(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Iterator[tuple[str, float]]:
    """Classify each query by its k most similar bank rows, and yield the percentage that is right.

    A neighbour's vote is exp(cosine / temperature), the protocol of instance discrimination
    (1805.01978 §3.4) that DINO and AM-RADIO report. Runs on the bank's device.

    Args:
        k: Capped at the size of the bank.

    Raises:
        ValueError: shapes do not fit, a set is empty, a feature is not finite.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    if k < 1 or not temperature > 0:
        raise ValueError(f"k is {k} and the temperature {temperature}; both must be positive.")
    bank = F.normalize(bank.float(), dim=-1)
    bank_labels = bank_labels.to(bank.device)
    k, classes = min(k, len(bank)), int(bank_labels.max()) + 1
    correct = torch.zeros((), dtype=torch.long, device=bank.device)
    rows = max(1, SIMILARITIES_AT_ONCE // len(bank))
    for some, labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
        cosine = F.normalize(some.to(bank.device).float(), dim=-1) @ bank.T
        near, where = cosine.topk(k, dim=-1)
        # Relative to the nearest, whose vote is 1: no temperature can over- or underflow them all.
        weight = ((near - near[:, :1]).double() / temperature).exp()
        votes = weight.new_zeros(len(some), classes)
        votes.scatter_add_(1, bank_labels[where], weight)
        correct += (votes.argmax(dim=-1) == labels.to(bank.device)).sum()
    yield "knn/top1", 100 * correct.item() / len(queries)


def check_sets(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> None:
    """Refuse a bank and queries that no classifier could be measured on.

    Raises:
        ValueError: shapes do not fit, a set is empty, a feature is not finite, a label is negative.
    """
    for what, rows, labels in (("bank", bank, bank_labels), ("query", queries, query_labels)):
        if rows.ndim != 2 or labels.shape != rows.shape[:1]:
            raise ValueError(
                f"The {what} features have the shape {tuple(rows.shape)} and their labels "
                f"{tuple(labels.shape)}; they must be [n, D] and [n]."
            )
        if not len(rows):
            raise ValueError(f"The {what} set is empty; give at least one labelled image.")
        if labels.min() < 0:
            raise ValueError(f"A {what} label is {int(labels.min())}; labels count from 0.")
        if not rows.isfinite().all():
            bad = int((~rows.isfinite().all(dim=-1)).sum())
            raise ValueError(f"{bad} of {len(rows)} {what} features hold NaN or infinity.")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"The bank has {bank.shape[1]} channels and the queries have {queries.shape[1]}; "
            "extract both with one model."
        )
