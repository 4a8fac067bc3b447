"""Losses between a student and a teacher: plain functions of two tensors.

Spatial maps are channels last. All of them compute in float32 at least, and average over
everything, so a loss does not grow with the batch, the grid or the width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from zoo.train.distill.config import Losses, SummaryLoss


def summary_loss(ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Average the cosine distance of the summaries (AM-RADIO, 2312.06709, section 3.4)."""
    return cosine(ours, theirs)


def angle(
    ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"], *, dispersion: float = 1.0
) -> Float[Tensor, ""]:
    """Average the squared angle of the summaries over the teacher's dispersion (C-RADIOv4, 2.5).

        L = Θ(x, y)² / Disp,    Disp = E[Θ(y, μ)²],    μ = E[y] / ‖E[y]‖

    A student that answers μ to every image has the loss 1 with any teacher, so none of them
    dominates because its vectors are spread more widely.

    Args:
        dispersion: Of the teacher, in radians squared (`dispersion` measures it).
    """
    return _angles(*_widened(ours, theirs)).square().mean() / dispersion


@torch.no_grad()
def dispersion(y: Float[Tensor, "n C"]) -> Float64[Tensor, ""]:
    """Return the mean squared angle between vectors and their mean direction (C-RADIOv4, 2.5).

    In float64, and about the mean of all of them: a running mean would bias what came early.
    """
    y = y.double()
    return _angles(y, y.mean(0).expand_as(y)).square().mean()


def _angles(ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """Return Θ = 2 atan2(‖a − b‖, ‖a + b‖) of unit vectors (Kahan).

    Not arccos(cos Θ): near equal vectors its slope is infinite and half of the digits are gone, and
    a clamp of the cosine would make the last 0.1° free. This has a finite gradient everywhere.
    """
    a, b = (F.normalize(x, dim=-1) for x in (ours, theirs))
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), (a + b).norm(dim=-1))


def bce(ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Average the binary cross-entropy (Hydra-MDP, 2406.06978: heads of rule-based teachers).

    Args:
        ours: Logits.
        theirs: Probabilities, each for itself.
    """
    return F.binary_cross_entropy_with_logits(*_widened(ours, theirs))


def cross_entropy(ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Average -Σ y log softmax(x) (Hydra-MDP, 2406.06978: imitation by soft targets).

    Args:
        ours: Logits.
        theirs: Probabilities that add up to 1.
    """
    ours, theirs = _widened(ours, theirs)
    return -(theirs * ours.log_softmax(dim=-1)).sum(-1).mean()


def summary_distance(kind: SummaryLoss, *, dispersion: float = 1.0) -> Callable[..., Tensor]:
    """Return a loss of summaries by its name.

    Args:
        dispersion: Of the teacher, which `angle` divides by.
    """
    if kind == "angle":
        return partial(angle, dispersion=dispersion)
    return {"cosine": summary_loss, "bce": bce, "cross_entropy": cross_entropy}[kind]


def constant_guess(kind: SummaryLoss, y: Float[Tensor, "n C"]) -> Float[Tensor, ""]:
    """Return what the best constant answer loses: the entropy of the mean of probabilities.

    Of `angle` it is the dispersion, before the loss is divided by this very number; of cosines the
    loss of the mean direction.
    """
    if kind == "angle":
        return dispersion(y)
    if kind == "cosine":
        unit = F.normalize(y, dim=-1)
        return summary_loss(unit.mean(0).expand_as(unit), unit)
    mean = y.mean(0).clamp_min(torch.finfo(y.dtype).tiny)
    logits = mean.logit(eps=1e-7) if kind == "bce" else mean.log()
    return summary_distance(kind)(logits.expand_as(y), y)


def refuse_no_probabilities(kind: SummaryLoss, y: Float[Tensor, "n C"], label: str) -> None:
    """Check that a teacher's summaries are what its loss takes them for.

    Raises:
        ValueError: they are not probabilities.
    """
    if kind not in ("bce", "cross_entropy"):
        return
    low, high = y.aminmax()
    if low < -1e-6 or high > 1 + 1e-6:
        raise ValueError(
            f"The teacher {label} has loss={kind}, which is for probabilities, and its summaries "
            f"are between {low:.3g} and {high:.3g}; leave loss= out."
        )
    sums = y.sum(-1)
    if kind == "cross_entropy" and (sums - 1).abs().max() > 1e-3:
        raise ValueError(
            f"The teacher {label} has loss=cross_entropy, which is for probabilities that add up "
            f"to 1, and its add up to {sums.min():.3g} to {sums.max():.3g}; loss=bce takes each "
            "for itself."
        )


def cosine(ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"]) -> Float[Tensor, ""]:
    """Average 1 − cos over all vectors: 0 for the same direction, 2 for the opposite one."""
    return 1 - F.cosine_similarity(*_widened(ours, theirs), dim=-1).mean()


def mse(ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"]) -> Float[Tensor, ""]:
    """Average the squared difference (PHI-S, 2410.01680: on normalised targets)."""
    return F.mse_loss(*_widened(ours, theirs))


def smooth_l1(
    ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"], *, beta: float = 1.0
) -> Float[Tensor, ""]:
    """Average the Huber-like loss: quadratic below `beta`, linear above.

    Args:
        beta: In units of the targets. AM-RADIO says "smooth L1", whose usual `beta` is 1.
    """
    return F.smooth_l1_loss(*_widened(ours, theirs), beta=beta)


def hybrid(
    ours: Float[Tensor, "*B C"],
    theirs: Float[Tensor, "*B C"],
    *,
    shares: tuple[float, float] = (0.9, 0.1),
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Add cosine distance and smooth L1 (AM-RADIO, 2312.06709, section 3.4).

    Args:
        shares: What the two count.
        beta: Of smooth L1.
    """
    cosines, lengths = shares
    return cosines * cosine(ours, theirs) + lengths * smooth_l1(ours, theirs, beta=beta)


def by_image(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a loss that averages over a batch into one that gives each image's own, [B].

    Their mean is what `loss` gives, since every image has as many positions.
    """
    return torch.vmap(lambda ours, theirs: loss(ours[None], theirs[None]))


def over_seen(
    loss: Callable[[Tensor, Tensor], Tensor],
    ours: Float[Tensor, "B H W C"],
    theirs: Float[Tensor, "B H W C"],
    seen: Bool[Tensor, "B H W"],
) -> Float[Tensor, " B"]:
    """Average a loss over the positions Ω that count of each image (C-RADIOv4, 2.3): (1/|Ω|) Σ."""
    each = by_image(loss)(ours.flatten(0, 2), theirs.flatten(0, 2)).view(seen.shape)
    return (each * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)


SPATIAL_LOSSES = {"mse": mse, "smooth_l1": smooth_l1, "cosine": cosine, "hybrid": hybrid}


def spatial_loss(settings: Losses) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of the maps that a run asks for."""
    options: dict[str, Any] = dict(beta=settings.beta) if settings.spatial != "mse" else {}
    if settings.spatial == "hybrid":
        options["shares"] = settings.hybrid
    return partial(SPATIAL_LOSSES[settings.spatial], **options)


def adaloss(running: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Weigh each loss by the inverse of its running mean (AdaLoss, in AM-RADIO section 3.4).

    Args:
        running: What `running_losses` returned; NaN for a loss that has none yet, which weighs 1.
    """
    weights = 1 / running.clamp_min(torch.finfo(running.dtype).tiny)
    return torch.where(running.isnan(), 1.0, weights)


def running_losses(
    losses: Float[Tensor, " T"], running: Float[Tensor, " T"], *, momentum: float = 0.99
) -> Float[Tensor, " T"]:
    """Follow the losses of one step by an exponential mean that starts at the first of them.

    Args:
        losses: Means over a step's batch; NaN for a loss that was left out, whose mean stays.
        running: What the call before returned; NaN at first.
    """
    after = torch.lerp(losses, torch.where(running.isnan(), losses, running), momentum)
    return torch.where(losses.isnan(), running, after)


def _widened(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in their common dtype, float32 at least: bfloat16 sums would lose the loss."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"Ours is {tuple(ours.shape)} and theirs {tuple(theirs.shape)}; a loss compares equal "
            "shapes (`zoo.features.match_grid` brings two maps to one grid)."
        )
    wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    return ours.to(wide), theirs.to(wide)
