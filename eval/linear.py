"""Linear probe: multinomial logistic regression on frozen features."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.knn import check_sets

LOGITS_AT_ONCE = 2**26
"""Entries of the rows x classes matrix that are held at a time (256 MiB in float32)."""


def linear_probe(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    strengths: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    max_steps: int = 200,
) -> Iterator[tuple[str, float]]:
    """Fit a linear classifier to the bank, and yield the percentage of queries that it gets right.

    Features are standardised with the bank's mean and deviation. The fit minimises

        mean cross-entropy + strength / 2 · ‖W‖²

    (scikit-learn's `C` is 1 / (n · strength)) by L-BFGS. Of several strengths the one with the
    lowest cross-entropy on a held-out tenth of the bank is taken, and fitted again to all of it.
    Nothing is random: the tenth is drawn with a fixed seed, so the same features give the same
    number. Runs on the bank's device.

    Raises:
        ValueError: shapes do not fit, a set is empty, a feature is not finite, or the bank has
            too few rows to hold any out.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    if not strengths or min(strengths) < 0:
        raise ValueError(f"The strengths are {tuple(strengths)}; give at least one, none negative.")
    bank, labels = bank.float(), bank_labels.to(bank.device)
    std, mean = torch.std_mean(bank, dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-30), std, 1)  # a constant channel
    bank = (bank - mean) / std
    classes = int(labels.max()) + 1
    strength = strengths[0]
    if len(strengths) > 1:
        strength = _best_strength(bank, labels, classes, strengths, max_steps)
    weights = _fit(bank, labels, bank.new_zeros(bank.shape[1] + 1, classes), strength, max_steps)
    correct = torch.zeros((), dtype=torch.long, device=bank.device)
    rows = max(1, LOGITS_AT_ONCE // classes)
    for some, truth in zip(queries.split(rows), query_labels.split(rows), strict=True):
        logits = _logits((some.to(bank.device).float() - mean) / std, weights)
        correct += (logits.argmax(dim=-1) == truth.to(bank.device)).sum()
    yield "linear/top1", 100 * correct.item() / len(queries)


def _best_strength(
    bank: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], max_steps: int
) -> float:
    """Choose by cross-entropy, which moves smoothly where accuracy on few rows jumps."""
    if len(bank) < 2:
        raise ValueError(
            "The bank has one row, and a strength cannot be chosen on none. Give more labelled "
            "images, or a single strength."
        )
    # Shuffled, because labelled files often come sorted or with a period; on the CPU, because
    # every device then holds out the same rows.
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
    held, kept = order.to(bank.device).tensor_split([max(1, len(bank) // 10)])
    rows, truth = bank[kept], labels[kept]
    weights = bank.new_zeros(bank.shape[1] + 1, classes)
    found = []
    for strength in sorted(strengths, reverse=True):  # each fit starts where the last one ended
        weights = _fit(rows, truth, weights, strength, max_steps)
        loss = F.cross_entropy(_logits(bank[held], weights), labels[held])
        found.append((loss.item(), -strength))
    return -min(found)[1]


def _logits(x: Float[Tensor, "n D"], weights: Float[Tensor, "D+1 classes"]) -> Tensor:
    return x @ weights[:-1] + weights[-1]


@torch.enable_grad()
def _fit(x: Tensor, labels: Tensor, start: Tensor, strength: float, max_steps: int) -> Tensor:
    """Minimise the penalised cross-entropy from `start`, whose last row is the bias."""
    weights = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weights],
        max_iter=max_steps,
        history_size=10,
        tolerance_grad=1e-5,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, LOGITS_AT_ONCE // weights.shape[1])
    parts = list(zip(x.split(rows), labels.split(rows), strict=True))

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = strength / 2 * weights[:-1].square().sum()
        total.backward()
        total = total.detach()
        for some, truth in parts:
            part = F.cross_entropy(_logits(some, weights), truth, reduction="sum") / len(x)
            part.backward()  # part by part, so that one part's logits are held at a time
            total += part.detach()
        return total

    optimiser.step(loss)
    return weights.detach()
