"""Weighted k-nearest neighbours: how good features are before anything is fitted to them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.confusion import balanced, class_names_of, confusion, drawn
from zoo.eval.examples import Example, chosen
from zoo.eval.extract import Extracted
from zoo.eval.registry import Found, Scores, Subject, check_classes
from zoo.eval.settings import KnnSettings

SIMILARITIES_AT_ONCE = 2**26
"""Entries of the queries x bank matrix that are in memory at a time (256 MiB in float32)."""

P = TypeVar("P")

BANK_ROWS_AT_ONCE = 2**16
"""Rows of the bank that are normalised, and if necessary moved to the device, at a time."""


def measure(subject: Subject, data: Path, settings: KnnSettings) -> Iterator[Found]:
    """Yield `knn/top1`, the accuracy of kNN on a model's summaries.

    Raises:
        ValueError: the images have no classes, or as `predict_knn`.
    """
    answers = FoldPredictions()
    for bank, queries in folds_of(*subject.extracted(data), settings.folds, subject.seed):
        assert bank.labels is not None and queries.labels is not None
        predicted = predict_knn(
            bank.summaries,
            bank.labels,
            queries.summaries,
            queries.labels,
            k=settings.k,
            temperature=settings.temperature,
            device=subject.device,
        )
        answers.add(predicted, queries)
    yield from answers.found("knn", subject, data, draw=settings.confusion)
    yield from answers.examples("knn", subject, data)


def folds_of(
    train: Extracted, val: Extracted, folds: int, seed: int
) -> Iterator[tuple[Extracted, Extracted]]:
    """Yield what is learnt from and what is tested: the two parts, or k folds of both together.

    In the folds each class is spread evenly, so that each image is tested once.

    Raises:
        ValueError: there is one fold, or more than images.
    """
    if not folds:
        yield train, val
        return
    assert train.labels is not None and val.labels is not None
    summaries = torch.cat([train.summaries, val.summaries])
    labels, keys = torch.cat([train.labels, val.labels]), [*train.keys, *val.keys]
    if folds < 2 or folds > len(labels):
        raise ValueError(f"{folds} folds of {len(labels)} images; give 2 to {len(labels)}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, then dealt out in turns
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    for number in range(folds):
        sides = [torch.nonzero(mask)[:, 0] for mask in (fold != number, fold == number)]
        bank, queries = (
            Extracted(summaries[at], labels[at], [keys[i] for i in at.tolist()]) for at in sides
        )
        yield bank, queries


class FoldPredictions:
    """What was predicted for the images of all folds."""

    def __init__(self):
        self.keys: list[str] = []
        self.truth: list[np.ndarray] = []
        self.predicted: list[np.ndarray] = []

    def add(self, predicted: Int[Tensor, " m"], queries: Extracted) -> None:
        """Keep the classes predicted for a fold."""
        assert queries.labels is not None
        self.keys += queries.keys
        self.truth.append(queries.labels.cpu().numpy())
        self.predicted.append(predicted.cpu().numpy())

    def found(self, name: str, subject: Subject, data: Path, *, draw: bool) -> Iterator[Found]:
        """Yield the accuracy, its mean over classes, and the confusion matrix if it is asked for.

        Args:
            name: Of the benchmark, before the slash.
            draw: Yield the matrix.
        """
        truth, predicted = np.concatenate(self.truth), np.concatenate(self.predicted)
        hits = Scores(self.keys, (predicted == truth).astype(np.uint8))
        yield f"{name}/top1", hits
        yield f"{name}/mean_per_class", balanced(hits, truth)
        if draw:
            count = int(max(truth.max(), predicted.max())) + 1
            names = class_names_of(subject, data, count)
            yield f"{name}/confusion", drawn(confusion(truth, predicted, len(names)), names, name)

    def examples(self, name: str, subject: Subject, data: Path) -> Iterator[Found]:
        """Yield the model on the images that all models are shown on; none of stored features.

        Args:
            name: Of the benchmark, before the slash.
        """
        if subject.read is not None:
            return
        truth, predicted = (np.concatenate(x).tolist() for x in (self.truth, self.predicted))
        guesses = dict(zip(self.keys, zip(truth, predicted, strict=True), strict=True))
        names = class_names_of(subject, data, 1 + max(*truth, *predicted))
        shared = [sorted(guesses)[i] for i in chosen(len(guesses))]
        found: dict[str, np.ndarray] = {}
        for part in ("val", "train"):
            if len(found) < len(shared):
                found |= subject.open(data, part).pixels(shared)
        for key in shared:
            if key in found:
                true, guess = guesses[key]
                words = names[true], names[guess]
                yield f"{name}/example", Example(key, found[key], *words, right=true == guess)


def used(subject: Subject, data: Sequence[Path], settings: P) -> P:
    """Return the settings as they are, for every benchmark of labelled features.

    Raises:
        ValueError: a folder has no images, or they have no classes.
    """
    for folder in data if subject.read is None else ():
        check_classes(subject.open(folder, "train").classes, folder)
        subject.open(folder, "val")
    return settings


def knn(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> Iterator[tuple[str, float]]:
    """Classify queries by their k nearest bank rows; yield `knn/top1`, the accuracy in per cent.

    See `predict_knn` for the method, the arguments and the errors.
    """
    predicted = predict_knn(
        bank, bank_labels, queries, query_labels, k=k, temperature=temperature, device=device
    )
    yield (
        "knn/top1",
        100 * int((predicted == query_labels.to(predicted.device)).sum()) / len(queries),
    )


def predict_knn(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> Int[Tensor, " m"]:
    """Return the class for which each query's k most similar bank rows vote.

    A neighbour's vote weighs exp(cosine / temperature): the protocol of instance discrimination
    (1805.01978 §3.4), which DINO and AM-RADIO use. The bank is read once, part by part, and
    each query keeps its k nearest so far. Besides the two sets, which may be on another device and
    in half precision, the memory needed is one part of the bank, one block of similarities and
    k numbers for each query.

    Args:
        query_labels: Only checked; the predictions do not depend on them.
        k: At most the size of the bank is used.
        device: Where to compute; the bank's device by default.

    Raises:
        ValueError: shapes do not fit, a set is empty, a feature is not finite, a label is negative,
            or `k` or `temperature` is not positive.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    if k < 1 or not temperature > 0:
        raise ValueError(f"k is {k} and the temperature {temperature}; both must be positive.")
    device = bank.device if device is None else torch.device(device)
    k, classes = min(k, len(bank)), int(bank_labels.max()) + 1
    near, where = _nearest(bank, queries, k, device)
    # Relative to the nearest, whose vote is 1: no temperature makes all votes 0 or infinite.
    weight = ((near - near[:, :1]).double() / temperature).exp()
    bank_labels = bank_labels.to(device)
    rows = max(1, SIMILARITIES_AT_ONCE // classes)
    predicted = [
        some.new_zeros(len(some), classes).scatter_add_(1, bank_labels[at], some).argmax(dim=-1)
        for some, at in zip(weight.split(rows), where.split(rows), strict=True)
    ]
    return torch.cat(predicted)


def _nearest(
    bank: Tensor, queries: Tensor, k: int, device: torch.device
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Return the cosines and the bank rows of each query's k nearest, the nearest first."""
    part = min(len(bank), BANK_ROWS_AT_ONCE)
    rows = max(1, SIMILARITIES_AT_ONCE // part)
    best = torch.empty(len(queries), 0, device=device)
    where = torch.empty(len(queries), 0, dtype=torch.long, device=device)
    for first in range(0, len(bank), part):
        known = F.normalize(bank[first : first + part].to(device).float(), dim=-1)
        found = []
        for start in range(0, len(queries), rows):
            here = slice(start, start + rows)
            cosine = F.normalize(queries[here].to(device).float(), dim=-1) @ known.T
            near, at = cosine.topk(min(k, len(known)), dim=-1)
            near, at = torch.cat([best[here], near], 1), torch.cat([where[here], at + first], 1)
            near, order = near.topk(min(k, near.shape[1]), dim=-1)
            found.append((near, at.gather(1, order)))
        best, where = (torch.cat(side) for side in zip(*found, strict=True))
    return best, where


def check_sets(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> None:
    """Refuse a bank and queries that cannot be classified.

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
        # By sums of rows in float32, part by part: a mask of a million rows takes gigabytes.
        sums = [x.float().sum(dim=-1) for x in rows.split(BANK_ROWS_AT_ONCE)]
        bad = (~torch.cat(sums).isfinite()).sum()
        if bad:
            raise ValueError(f"{int(bad)} of {len(rows)} {what} features hold NaN or infinity.")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"The bank has {bank.shape[1]} channels and the queries have {queries.shape[1]}; "
            "extract both with one model."
        )
