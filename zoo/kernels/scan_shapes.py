"""Numbers and shapes that the scan's operator and its kernels share."""

from torch import Tensor

BLOCK = 8
"""Tokens between two saved states."""


MAX_STATES = 16
"""Most states of a channel that the kernels take in one call."""


def padded_states(num_states: int) -> int:
    """Return the power of two, 4 at least, that the kernels pad the states to."""
    return max(4, 1 << (num_states - 1).bit_length())


def saved_states_shape(x: Tensor, A: Tensor) -> tuple[int, int, int]:
    """Return the shape of `saved_states`: for each block a row, the state it starts from.

    Three axes and not four: a compiler with convolutions in its graph would take four for a map,
    copy it to channels last, and back again for the backward pass.
    """
    batch, length, chs = x.shape
    return batch, (length + BLOCK - 1) // BLOCK, padded_states(A.shape[1]) * chs
