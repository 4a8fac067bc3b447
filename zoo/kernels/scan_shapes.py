"""Numbers and shapes that the scan's operator and its kernels share."""

from torch import Tensor

BLOCK = 8
"""Tokens between two saved states."""


MAX_STATES = 16
"""Most states of a channel that the kernels take at once."""


def padded_states(num_states: int) -> int:
    """Return the power of two, 4 at least, that the kernels pad the states to."""
    return max(4, 1 << (num_states - 1).bit_length())


def shape_of_borders(x: Tensor, A: Tensor) -> tuple[int, int, int]:
    """Return the shape of what the forward saves: a row of all entries of the state for each block.

    Not four axes: for a compiler with convolutions in its graph that would be a map, which it
    copies to channels last, and back before the backward.
    """
    batch, length, chs = x.shape
    return batch, (length + BLOCK - 1) // BLOCK, padded_states(A.shape[1]) * chs
