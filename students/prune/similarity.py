"""How alike two representations of the same samples are, when their channels differ."""

from jaxtyping import Float
from torch import Tensor

LEAST = 4
"""Samples, from which on the estimate exists."""


def linear_cka(x: Float[Tensor, "n C"], y: Float[Tensor, "n D"]) -> float:
    """Return the linear CKA of two representations: 1 if one is the other, rotated; 0 for noise.

    Kornblith et al. (1905.00414), section 3, with the unbiased estimate of HSIC that Nguyen et al.
    (2010.15327), section 3.1, put into it: fewer samples than channels would make any two
    representations look alike otherwise (two samples: always 1). It can be below 0, as noise is.

    Raises:
        ValueError: fewer than four samples.
    """
    if len(x) < LEAST:
        raise ValueError(f"CKA compares {LEAST} samples or more; there are {len(x)}.")
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    norm = (_hsic(x, x) * _hsic(y, y)).sqrt()
    return (_hsic(x, y) / norm.clamp(min=1e-30)).item()


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """Return n (n - 3) times the unbiased HSIC of linear kernels, from centred features.

    Song et al. (2012, JMLR 13), equation 5, where rows of a kernel without its diagonal add up to
    minus the squared length of each sample. Nothing of n x n is made.
    """
    n = len(x)
    a, b = x.square().sum(1), y.square().sum(1)
    diagonal = n / (n - 2) * (a * b).sum() - a.sum() * b.sum() / ((n - 1) * (n - 2))
    return (x.T @ y).square().sum() - diagonal
