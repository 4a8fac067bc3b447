"""Hadamard matrices: rotations that spread every axis evenly over all the others."""

from functools import lru_cache
from itertools import count
from math import isqrt

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor


def hadamard(dim: int) -> Float64[Tensor, "C C"]:
    """Return the orthonormal Hadamard matrix of order `dim`: every entry is ±1/√dim.

    Sylvester's doubling of the smallest Paley matrix (1933) that fits, as RADIO builds it, so the
    signs are those of its published normalisers. The same matrix on every machine; each call
    returns a tensor of its own.

    Raises:
        ValueError: there is no such matrix, or none that this construction reaches.
    """
    return torch.from_numpy(_signs(dim) / np.sqrt(dim))


def has_hadamard(dim: int) -> bool:
    """Tell whether `hadamard(dim)` exists; nearly all widths of vision models are among them."""
    return _split(dim) is not None


def orthogonal(dim: int) -> Float64[Tensor, "C C"]:
    """Return an orthogonal matrix for a width without a Hadamard matrix, always the same one.

    Drawn from a generator of its own that `dim` seeds, so ranks and restarts agree up to the last
    bits of their linear algebra library. Uniform over the orthogonal matrices: it spreads axes
    evenly on average only.
    """
    gaussian = np.random.default_rng(dim).standard_normal((dim, dim))
    basis, triangle = np.linalg.qr(gaussian)
    # QR leaves the sign of each column to the library; a positive diagonal makes it unique.
    return torch.from_numpy(basis * np.where(np.diag(triangle) < 0, -1.0, 1.0))


@lru_cache(maxsize=8)
def _signs(dim: int) -> np.ndarray:
    parts = _split(dim)
    if parts is None:
        larger = next(d for d in count(max(dim, 1)) if has_hadamard(d))
        raise ValueError(
            f"No Hadamard matrix of order {dim} is built here; the next order that has one is "
            f"{larger}. `orthogonal({dim})` works for any width."
        )
    doublings, core = parts
    signs = _paley(core)
    for _ in range(doublings):
        signs = np.block([[signs, signs], [signs, -signs]])
    signs.setflags(write=False)  # every caller shares it
    return signs


def _split(dim: int) -> tuple[int, int] | None:
    """Write `dim` as 2^doublings · core with the smallest core that `_paley` builds."""
    doublings = (dim & -dim).bit_length() - 1 if dim > 0 else -1
    for k in range(doublings, -1, -1):
        core = dim >> k
        if core == 1 or _is_paley_1(core) or _is_paley_2(core):
            return k, core
    return None


def _is_paley_1(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_2(order: int) -> bool:
    return order % 8 == 4 and _is_prime(order // 2 - 1)


def _paley(order: int) -> np.ndarray:
    """Build the ±1 matrix of type I (from a prime 3 mod 4), else of type II (from one 1 mod 4)."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    if _is_paley_1(order):
        skew = _bordered_residues(order - 1)
        skew[1:, 0] = -1
        return skew + np.eye(order, dtype=np.int8)
    conference = _bordered_residues(order // 2 - 1)
    off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
    on_diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    diagonal = np.eye(order // 2, dtype=np.int8)
    return np.kron(conference, off_diagonal) + np.kron(diagonal, on_diagonal)


def _bordered_residues(prime: int) -> np.ndarray:
    """Put a border of ones around the matrix χ(i − j) of the quadratic character mod `prime`."""
    steps = np.arange(prime)
    character = np.full(prime, -1, np.int8)
    character[steps**2 % prime] = 1
    character[0] = 0
    bordered = np.ones((prime + 1, prime + 1), np.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(steps[:, None] - steps) % prime]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, isqrt(number) + 1))
