"""Linear probe: multinomial logistic regression on frozen features."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.extract import Extracted
from zoo.eval.knn import FoldPredictions, check_sets, folds_of
from zoo.eval.registry import Found, Subject
from zoo.eval.settings import STRENGTHS, LinearSettings, Solver

_log = logging.getLogger(__name__)

FURTHER = 4
"""Strengths that are tried beyond those given, each ten times further."""
UNCONVERGED = 1e-4
"""A larger part of the gradient means that L-BFGS was stopped on its way."""
LOGITS_AT_ONCE = 2**26
"""Entries of the rows x classes matrix that are in memory at a time (256 MiB in float32)."""


def measure(subject: Subject, data: Path, settings: LinearSettings) -> Iterator[Found]:
    """Yield the accuracy of each solver: `linear/top1`, `linear_ridge/top1`, `linear_sgd/top1`.

    Raises:
        ValueError: the images have no classes, or as the functions of the solvers.
    """
    for solver in settings.solvers:
        answers = FoldPredictions()
        for pair in folds_of(*subject.extracted(data), settings.folds, subject.seed):
            bank, queries = (_on(side, subject.device) for side in pair)
            assert bank.labels is not None and queries.labels is not None
            predicted = _predicted(solver, bank, queries, settings, subject.seed)
            answers.add(predicted, queries)
        name = "linear" if solver == "lbfgs" else f"linear_{solver}"
        yield from answers.found(name, subject, data, draw=settings.confusion)
        if solver == settings.solvers[0]:
            yield from answers.examples(name, subject, data)


def _predicted(
    solver: Solver, bank: Extracted, queries: Extracted, settings: LinearSettings, seed: int
) -> Int[Tensor, " m"]:
    assert bank.labels is not None and queries.labels is not None
    sets = bank.summaries, bank.labels, queries.summaries, queries.labels
    if solver == "lbfgs":
        return predict_linear(
            *sets,
            strengths=settings.strengths,
            max_steps=settings.max_steps,
            widen=settings.widen,
        )
    if solver == "ridge":
        return predict_ridge(*sets, strengths=settings.strengths)
    return predict_sgd(
        *sets,
        rates=settings.rates,
        epochs=settings.epochs,
        batch=settings.batch,
        least_steps=settings.least_steps,
        seed=seed,
    )


def _on(side: Extracted, device: torch.device) -> Extracted:
    labels = None if side.labels is None else side.labels.to(device)
    return Extracted(side.summaries.to(device), labels, side.keys)


def linear_probe(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    max_steps: int = 200,
) -> Iterator[tuple[str, float]]:
    """Fit a linear classifier to the bank; yield `linear/top1`, the accuracy in per cent.

    See `predict_linear` for the method, the arguments and the errors.
    """
    predicted = predict_linear(
        bank, bank_labels, queries, query_labels, strengths=strengths, max_steps=max_steps
    )
    yield (
        "linear/top1",
        100 * int((predicted == query_labels.to(predicted.device)).sum()) / len(queries),
    )


def predict_linear(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    max_steps: int = 200,
    widen: bool = False,
) -> Int[Tensor, " m"]:
    """Fit a linear classifier to the bank, and return the class that it predicts for each query.

    Features are standardised with the bank's mean and standard deviation. The fit minimises

        mean cross-entropy + strength / 2 · ‖W‖²

    (scikit-learn's `C` is 1 / (n · strength)) by L-BFGS. Of several strengths the one with the
    lowest cross-entropy on a held-out tenth of the bank is used for a last fit to the whole bank.
    The tenth is drawn with a fixed seed, so the same features always have the same result. Runs on
    the bank's device.

    A warning is logged if the best of the strengths is an end of their range, or if the last fit
    did not converge within `max_steps`.

    Args:
        widen: While the best strength is an end of the range, try ten times that (or a tenth), at
            most `FURTHER` times; then those between it and its neighbours.

    Raises:
        ValueError: shapes do not fit, a set is empty, a feature is not finite, a label or a
            strength is negative, there is no strength, or the bank has too few rows for a
            held-out tenth.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    _check_strengths(strengths)
    bank, labels, standardise = standardised(bank, bank_labels)
    classes = int(labels.max()) + 1
    strength = strengths[0]
    if len(strengths) > 1:
        strength = _best_strength(bank, labels, classes, strengths, max_steps, widen=widen)
    weights, slope = _fit(
        bank, labels, bank.new_zeros(bank.shape[1] + 1, classes), strength, max_steps
    )
    if slope > UNCONVERGED:
        _log.warning(
            "The linear probe did not converge in %d steps at the strength %g: its gradient is "
            "still %.1e. Give more steps (--linear.max-steps).", max_steps, strength, slope,
        )  # fmt: skip
    return predict_rows(weights, queries, standardise)


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or min(strengths) < 0:
        raise ValueError(f"The strengths are {tuple(strengths)}; give at least one, none negative.")


Standardise = Callable[[Tensor], Tensor]


def standardised(
    bank: Float[Tensor, "n D"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"], Standardise]:
    """Shift and scale the bank's channels to mean 0 and deviation 1; constant channels become 0.

    Return the new bank, the labels on its device, and a function that does the same to other rows.
    """
    bank = bank.float()
    std, mean = torch.std_mean(bank, dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-30), std, 1)  # a constant channel

    def standardise(x: Tensor) -> Tensor:
        return (x.to(mean.device).float() - mean) / std

    return standardise(bank), labels.to(bank.device), standardise


def predict_rows(
    weights: Float[Tensor, "D+1 classes"], queries: Tensor, standardise: Standardise
) -> Int[Tensor, " m"]:
    """Return the class with the largest logit for each query."""
    rows = max(1, LOGITS_AT_ONCE // max(weights.shape))
    return torch.cat(
        [_logits(standardise(some), weights).argmax(dim=-1) for some in queries.split(rows)]
    )


def predict_ridge(
    bank: Float[Tensor, "n D"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    query_labels: Int[Tensor, " m"],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Int[Tensor, " m"]:
    """Regress the classes' indicators on the features, in closed form.

        W = (XᵀX / n + s λ̄ I)⁻¹ Xᵀ(Y − Ȳ) / n,    λ̄ = tr(XᵀX / n) / D

    One decomposition serves every strength s; of several the one with the best accuracy on a
    held-out tenth is used. Computed in float64, since the normal equations square the condition
    number.

    Raises:
        ValueError: as `predict_linear`.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    _check_strengths(strengths)
    bank, labels, standardise = standardised(bank, bank_labels)
    classes = int(labels.max()) + 1
    strength = strengths[0]
    if len(strengths) > 1:
        held, kept = hold_out(len(bank), bank.device)
        found = []
        for one, weights in _ridge(bank[kept], labels[kept], classes, strengths):
            right = (_logits(bank[held], weights).argmax(dim=-1) == labels[held]).sum()
            found.append((int(right), one))
        strength = max(found)[1]
    ((_, weights),) = _ridge(bank, labels, classes, [strength])
    return predict_rows(weights, queries, standardise)


def _ridge(
    x: Tensor, labels: Tensor, classes: int, strengths: Sequence[float]
) -> Iterator[tuple[float, Tensor]]:
    rows = max(1, LOGITS_AT_ONCE // max(classes, x.shape[1]))
    width, device = x.shape[1], x.device
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, classes, dtype=torch.float64, device=device)
    mean = x.mean(dim=0, dtype=torch.float64)
    share = torch.bincount(labels, minlength=classes).double() / len(x)
    for some, truth in zip(x.split(rows), labels.split(rows), strict=True):
        centred = some.double() - mean
        gram += centred.T @ centred / len(x)
        cross.index_add_(1, truth, centred.T / len(x))  # Xᵀ Y, without building Y
    levels, axes = torch.linalg.eigh(gram)
    scale = levels.mean().clamp(min=1e-300)
    for strength in strengths:
        # Directions in which the rows do not vary stay zero, as in the least-norm solution.
        damped = levels + max(strength, 1e-12) * scale
        weights = axes @ ((axes.T @ cross) / damped[:, None])
        bias = share - mean @ weights
        yield strength, torch.cat([weights, bias[None]]).float()


def hold_out(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the indices of a held-out tenth and of the rest, the same on each call.

    Raises:
        ValueError: there is only one row.
    """
    if count < 2:
        raise ValueError(
            "The bank has one row, so none can be held out to choose a strength. Give more "
            "labelled images, or a single strength."
        )
    # Shuffled, since labelled files are often sorted or periodic; on the CPU, so that every
    # device holds out the same rows.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, kept = order.to(device).tensor_split([max(1, count // 10)])
    return held, kept


def _best_strength(
    bank: Tensor,
    labels: Tensor,
    classes: int,
    strengths: Sequence[float],
    max_steps: int,
    *,
    widen: bool,
) -> float:
    """Choose by cross-entropy, which is smooth where the accuracy on a few rows jumps."""
    held, kept = hold_out(len(bank), bank.device)
    rows, truth = bank[kept], labels[kept]
    weights = bank.new_zeros(bank.shape[1] + 1, classes)
    losses: dict[float, float] = {}

    def attempt(strength: float, start: Tensor) -> Tensor:
        fitted, _ = _fit(rows, truth, start, strength, max_steps)
        losses[strength] = F.cross_entropy(_logits(bank[held], fitted), labels[held]).item()
        return fitted

    for strength in sorted(strengths, reverse=True):  # each fit starts where the last one ended
        weights = attempt(strength, weights)
    for _ in range(FURTHER if widen else 0):
        best = _lowest(losses)
        if best == max(losses):
            attempt(10 * best, torch.zeros_like(weights))
        elif best == min(losses) and best > 0:
            weights = attempt(best / 10, weights)
        else:
            break
    best = _lowest(losses)
    if best in (max(losses), min(losses)):
        _log.warning(
            "The best strength of the linear probe, %g, is an end of those that were tried.", best
        )
    for beside in (best * 10**0.5, best / 10**0.5) if widen and best else ():
        attempt(beside, torch.zeros_like(weights))
    return _lowest(losses)


def _lowest(losses: Mapping[float, float]) -> float:
    """Return the strength with the lowest loss; of several the strongest."""
    return -min((loss, -strength) for strength, loss in losses.items())[1]


def _logits(x: Float[Tensor, "n D"], weights: Float[Tensor, "D+1 classes"]) -> Tensor:
    return x @ weights[:-1] + weights[-1]


@torch.enable_grad()
def _fit(
    x: Tensor, labels: Tensor, start: Tensor, strength: float, max_steps: int
) -> tuple[Tensor, float]:
    """Minimise the penalised cross-entropy from `start`, whose last row is the bias.

    Return the weights, and the largest part of the gradient that is left.
    """
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
            part.backward()  # so that only one part's logits are in memory
            total += part.detach()
        return total

    optimiser.step(loss)
    loss()  # the last point that a line search tried need not be where it ended
    assert weights.grad is not None
    return weights.detach(), weights.grad.abs().max().item()


MOMENTUM = 0.9


def predict_sgd(
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
    """Train one linear classifier for each learning rate, and predict by the best of them.

    The protocol of DINOv2 (2304.07193, appendix B.3): momentum 0.9, no weight decay, a cosine to
    zero, the rate with the best accuracy on held-out data (here a tenth of the bank, then fitted
    to all of it). Rates are for a batch of 256 and grow with it. All of them share one pass over
    the rows: a step is one product for all. Standardised features, as in `predict_linear`.

    Args:
        least_steps: For a small bank, `epochs` are raised until there are this many steps.

    Raises:
        ValueError: as `predict_linear`; or no rate, an epoch or a batch below one.
    """
    check_sets(bank, bank_labels, queries, query_labels)
    if not rates or min(rates) <= 0 or epochs < 1 or batch < 1:
        raise ValueError(
            f"SGD with the rates {tuple(rates)}, {epochs} epochs and batches of {batch}: "
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
        ranked = zip(right.tolist(), (-loss.nan_to_num(torch.inf)).tolist(), rates, strict=True)
        rate = max(ranked)[2]  # of equally accurate ones the one with the lower loss
    epochs = _epochs(len(bank), batch, epochs, least_steps)
    weights = _train(bank, labels, classes, [rate], epochs, batch, seed)
    return predict_rows(weights[0], queries, standardise)


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
    """Train with all rates at once; the gradient of the softmax is written out."""
    batch = min(batch, len(x))
    weights = x.new_zeros(len(rates), x.shape[1] + 1, classes)
    speed = torch.zeros_like(weights)
    rate = torch.tensor(rates, device=x.device).view(-1, 1, 1) * batch / 256
    draws = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // batch
    steps = epochs * per_epoch
    # The cosine schedule as a tensor on the device, so that no step waits for the host.
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
