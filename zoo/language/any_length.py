"""Attention over texts whose length changes from call to call, as in generation."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp


@contextmanager
def any_length() -> Iterator[None]:
    """Within this context `scaled_dot_product_attention` leaves cuDNN's kernels out.

    torch takes them first on Hopper and Blackwell, and cuDNN makes a plan for each length that it
    has not met yet, which takes 36 ms on an H200 (torch 2.11) and 128 where a gradient is asked
    for; the other kernels need none and take less than 1. In generation every step is a new length.
    The choice is the process's: what other threads run changes with it. Measured by
    benchmarks/attention_lengths.py.
    """
    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    try:
        yield
    finally:
        enable_cudnn_sdp(before)
