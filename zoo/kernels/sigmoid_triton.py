"""Exponentials that several kernels need: device functions in Triton."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter runs on a CPU, without the GPU's library."""


@triton.jit
def inverse(x):
    """1 / x, within 2 units in the last place; 0 beyond 2^126.

    Triton's own quotient is exact out there too, for a seventh of a whole kernel's operations.
    """
    return 1 / x if INTERPRETED else libdevice.fast_dividef(1.0, x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return inverse(1 + tl.exp2(x * -LOG2E))
