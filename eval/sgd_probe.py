"""A linear probe by stochastic gradient descent: the protocol of sets too large for L-BFGS."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.knn import check_sets
from zoo.eval.linear import hold_out, said_by, standardised

MOMENTUM = 0.9


def sgd_classes(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    rates: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    epochs: int = 10,
    batch: int = 1024,
    least_steps: int = 1000,
    seed: int = 0,
) -> Int[Tensor, " m"]:
    """Train linear classifiers side by side, one a learning rate, and let the best one answer.

    The protocol of DINOv2 (2304.07193, appendix B.3): momentum 0.9, no weight decay, a cosine to
    zero, the rate with the best accuracy on held-out data (here a tenth of the bank, then fitted
    to all of it). Rates are for a batch of 256 and grow with it. All of them share one pass over
    the rows: a step is one product for all. Standardised features, as in `linear_classes`.

    Args:
        least_steps: A small bank is gone through more often than `epochs`, until so many steps.

    Raises:
        ValueError: as `linear_classes`; or no rate, an epoch or a batch below one.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    if not rates or min(rates) <= 0 or epochs < 1 or batch < 1:
        raise ValueError(
            f"SGD was asked for the rates {tuple(rates)}, {epochs} epochs and batches of {batch}; "
            "all must be positive."
        )
    bank, labels, standardise = standardised(bank, bank_labels)
    classes = int(labels.max()) + 1
    rate = rates[0]
    if len(rates) > 1:
        held, kept = hold_out(len(bank), bank.device)
        epochs_held = _epochs(len(kept), batch, epochs, least_steps)
        weights = _train(bank[kept], labels[kept], classes, rates, epochs_held, batch, seed)
        logits = torch.einsum("nD,rDc->rnc", bank[held], weights[:, :-1]) + weights[:, -1:]
        truth = labels[held].expand(len(rates), -1)
        right = (logits.argmax(dim=-1) == truth).double().mean(dim=1)
        loss = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none").mean(dim=1)
        told = zip(right.tolist(), (-loss.nan_to_num(torch.inf)).tolist(), rates, strict=True)
        rate = max(told)[2]  # of equally good ones the surer
    epochs = _epochs(len(bank), batch, epochs, least_steps)
    weights = _train(bank, labels, classes, [rate], epochs, batch, seed)
    return said_by(weights[0], queries, standardise)


def _epochs(rows: int, batch: int, epochs: int, least_steps: int) -> int:
    return max(epochs, -(-least_steps // max(1, rows // batch)))


def _train(
    x: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    classes: int,
    rates: Sequence[float],
    epochs: int,
    batch: int,
    seed: int,
) -> Float[Tensor, "rates D+1 classes"]:
    """Descend with all rates at once; the gradient of a softmax is written out."""
    batch = min(batch, len(x))
    weights = x.new_zeros(len(rates), x.shape[1] + 1, classes)
    speed = torch.zeros_like(weights)
    rate = torch.tensor(rates, device=x.device).view(-1, 1, 1) * batch / 256
    draws = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // batch
    steps = epochs * per_epoch
    # The cosine as data on the device: a step then waits for nothing that the host computes.
    schedule = (1 + torch.cos(torch.pi * torch.arange(steps, device=x.device) / steps)) / 2
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=draws).to(x.device)
        for number in range(per_epoch):
            some = order[number * batch : (number + 1) * batch]
            rows, truth = x[some], F.one_hot(labels[some], classes)
            logits = torch.einsum("nD,rDc->rnc", rows, weights[:, :-1]) + weights[:, -1:]
            slope = (logits.softmax(dim=-1) - truth) / batch
            step = torch.cat(
                [torch.einsum("nD,rnc->rDc", rows, slope), slope.sum(dim=1, keepdim=True)], dim=1
            )
            speed = MOMENTUM * speed + step
            weights = weights - schedule[epoch * per_epoch + number] * rate * speed
    return weights
