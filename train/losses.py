"""Losses between a student and a teacher: plain functions of two tensors.

Spatial maps are channels last. All of them compute in float32 at least, and average over
everything, so a loss does not grow with the batch, the grid or the width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def summary_loss(ours: Float[Tensor, "B C"], theirs: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Average the cosine distance of the summaries (AM-RADIO, 2312.06709, section 3.4)."""
    return cosine(ours, theirs)


def cosine(ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"]) -> Float[Tensor, ""]:
    """Average 1 − cos over all vectors: 0 for the same direction, 2 for the opposite one."""
    return 1 - F.cosine_similarity(*_widened(ours, theirs), dim=-1).mean()


def mse(ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"]) -> Float[Tensor, ""]:
    """Average the squared difference (PHI-S, 2410.01680: on targets that are balanced)."""
    return F.mse_loss(*_widened(ours, theirs))


def smooth_l1(
    ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"], *, beta: float = 1.0
) -> Float[Tensor, ""]:
    """Average the Huber-like loss: quadratic below `beta`, linear above.

    Args:
        beta: In units of the targets. AM-RADIO says "smooth L1", whose usual `beta` is 1.
    """
    return F.smooth_l1_loss(*_widened(ours, theirs), beta=beta)


def hybrid(ours: Float[Tensor, "*B C"], theirs: Float[Tensor, "*B C"]) -> Float[Tensor, ""]:
    """Add 0.9 cosine distance and 0.1 smooth L1 (AM-RADIO, 2312.06709, section 3.4)."""
    return 0.9 * cosine(ours, theirs) + 0.1 * smooth_l1(ours, theirs)


SPATIAL_LOSSES = {"mse": mse, "smooth_l1": smooth_l1, "cosine": cosine, "hybrid": hybrid}


def adaloss(
    losses: Float[Tensor, " T"], ema: Float[Tensor, " T"] | None, *, momentum: float = 0.99
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Weigh each loss by the inverse of its running mean (AdaLoss, in AM-RADIO section 3.4).

    The weights carry no gradient. Nothing waits for the device.

    Args:
        losses: The losses of one step, stacked.
        ema: What the call before returned; `None` at the first step.

    Returns:
        The weights, and the running means to keep for the next step.
    """
    seen = losses.detach()
    ema = seen if ema is None else torch.lerp(seen, ema, momentum)
    return 1 / ema.clamp_min(torch.finfo(ema.dtype).tiny), ema


def _widened(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Give both in their common dtype, float32 at least: bfloat16 sums would lose the loss."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"Ours is {tuple(ours.shape)} and theirs {tuple(theirs.shape)}; a loss compares equal "
            "shapes (`zoo.features.match_grid` brings two maps to one grid)."
        )
    wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    return ours.to(wide), theirs.to(wide)
