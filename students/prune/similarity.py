"""How alike two representations of the same samples are, when their channels differ."""

from jaxtyping import Float
from torch import Tensor


def linear_cka(x: Float[Tensor, "n C"], y: Float[Tensor, "n D"]) -> float:
    """Return the linear CKA of two representations, 0 to 1: 1 if one is the other, rotated.

    Kornblith et al. (1905.00414), section 3: ||YᵀX||² / (||XᵀX|| ||YᵀY||), both centred.
    """
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    norm = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / norm.clamp(min=1e-30)).item()
